"""Pure: which legs a worker refuses at once, whatever it does with the others."""

from tandem.errors import Overloaded, PromptTooLong

RETRY_AFTER_S = 1.0


def check_queue(waiting: int, most: int) -> None:
    """Raises Overloaded when so many legs wait that no more may."""
    if waiting >= most:
        raise Overloaded(f"{most} legs wait already", RETRY_AFTER_S)


def check_pool(tokens: int, pool_tokens: int) -> None:
    """Raises PromptTooLong for a sequence that the whole pool could not hold."""
    if tokens > pool_tokens:
        raise PromptTooLong(f"{tokens} tokens are more than the {pool_tokens} that this worker's pool holds")

"""Edge: from arguments to what the client takes; imports the client, so it is itself imported late."""

import argparse

from tandem.client import GenerateOptions
from tandem.errors import InvalidRequest
from tandem.generation import SamplingOptions

MAX_SEED = 2**64


def options_of(chosen: argparse.Namespace) -> GenerateOptions:
    """Raises InvalidRequest for numbers that do not fit the contract's types; the router checks the rest."""
    for name, value, limit in (
        ("--max-tokens", chosen.max_tokens, 2**32),
        ("--top-k", chosen.top_k, 2**32),
        ("--seed", chosen.seed, MAX_SEED),
    ):
        if value is not None and not 0 <= value < limit:
            raise InvalidRequest(f"{name} must be 0 to {limit - 1}, not {value}.", name)
    if not 0 < chosen.timeout <= 86_400:
        raise InvalidRequest(
            f"--timeout must be above 0 and at most 86400, not {chosen.timeout:g}.", "--timeout"
        )
    sampling = SamplingOptions(
        max_tokens=chosen.max_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
        seed=chosen.seed,
        stop=tuple(chosen.stop),
    )
    return GenerateOptions(sampling=sampling, slo_class=chosen.slo_class, timeout_s=chosen.timeout)

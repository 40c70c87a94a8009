"""Edge: says once that an outage began, and once that it is over."""

import structlog

log = structlog.get_logger(__name__)


class Outage:
    """Logs the beginning and the end of an outage once each."""

    def __init__(self, message: str, over: str = "the registry is back") -> None:
        self._message = message
        self._over = over
        self._going_on = False

    def began(self, error: Exception) -> None:
        """What was asked did not answer."""
        if not self._going_on:
            log.warning(self._message, error=str(error))
        self._going_on = True

    def ended(self) -> None:
        """It answered."""
        if self._going_on:
            log.info(self._over)
        self._going_on = False

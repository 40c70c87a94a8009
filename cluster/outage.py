"""Edge: says once that an outage of the registry began, and once that it is over."""

import structlog

log = structlog.get_logger(__name__)


class Outage:
    """Logs the beginning and the end of an outage once each."""

    def __init__(self, message: str) -> None:
        self._message = message
        self._going_on = False

    def began(self, error: Exception) -> None:
        """The registry did not answer."""
        if not self._going_on:
            log.warning(self._message, error=str(error))
        self._going_on = True

    def ended(self) -> None:
        """The registry answered."""
        if self._going_on:
            log.info("the registry is back")
        self._going_on = False

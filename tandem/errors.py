"""Pure: one tree of errors; each leaf says who can mend it and whether another worker may succeed.

Raised where the fault is known, translated to gRPC or HTTP once, at the edge.
"""

from enum import Enum
from typing import ClassVar


class MendedBy(Enum):
    """Who can do something about an error."""

    CLIENT = "client"
    OPERATOR = "operator"
    US = "us"


class TandemError(Exception):
    """Base of all errors that Tandem raises on purpose; its text is one sentence a client may see."""

    mended_by: ClassVar[MendedBy] = MendedBy.US
    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    retry_elsewhere: ClassVar[bool] = False
    retry_after_s: float | None = None
    """When asking again may help, in seconds; None when time alone mends nothing."""


class InvalidRequest(TandemError):
    """The request is wrong: says what, where, and what would be valid. `field` is the field's path."""

    mended_by = MendedBy.CLIENT
    grpc_code = "INVALID_ARGUMENT"
    http_status = 400

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Unsupported(InvalidRequest):
    """The request asks for something that we do not do; it is named, never silently dropped."""


class PromptTooLong(InvalidRequest):
    """Prompt (and the tokens asked for) exceed the context length; the message names both numbers."""


class UnknownModel(TandemError):
    """The model asked for is not served."""

    mended_by = MendedBy.CLIENT
    grpc_code = "NOT_FOUND"
    http_status = 404


class Unauthenticated(TandemError):
    """The API key or cluster token is missing or wrong."""

    mended_by = MendedBy.CLIENT
    grpc_code = "UNAUTHENTICATED"
    http_status = 401


class DuplicateRequest(TandemError):
    """A request with this id is running already and the new one does not resume it."""

    mended_by = MendedBy.CLIENT
    grpc_code = "ALREADY_EXISTS"
    http_status = 409


class Overloaded(TandemError):
    """The bounded queue is full; `retry_after_s` says when to come back."""

    mended_by = MendedBy.OPERATOR
    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(TandemError):
    """The request's deadline passed."""

    mended_by = MendedBy.OPERATOR
    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504


class NotReady(TandemError):
    """No pair of workers can serve now, and none came back in time."""

    mended_by = MendedBy.OPERATOR
    grpc_code = "UNAVAILABLE"
    http_status = 503
    retry_elsewhere = True
    retry_after_s = 1.0


class Cancelled(TandemError):
    """The client or an operator cancelled the request."""

    mended_by = MendedBy.CLIENT
    grpc_code = "CANCELLED"
    http_status = 499


class ConfigError(TandemError):
    """A configuration file is wrong: names file, path in it, and the allowed values."""

    mended_by = MendedBy.OPERATOR
    grpc_code = "FAILED_PRECONDITION"


class ModelError(TandemError):
    """A model folder or file cannot be served: names it, and what is missing or unsupported."""

    mended_by = MendedBy.OPERATOR
    grpc_code = "FAILED_PRECONDITION"


class OutOfBlocks(TandemError):
    """The block pool cannot give the blocks asked for; nothing was allocated."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 503
    retry_elsewhere = True


class ProtocolError(TandemError):
    """A message came that has no row in its protocol's table; names state and input."""


class TransferFault(Enum):
    """What went wrong with a transfer; the label of a metric."""

    DIGEST = "digest"
    STALE_EPOCH = "stale_epoch"
    LENGTH = "length"
    CHECKSUM = "checksum"
    TRUNCATED = "truncated"
    DISCONNECTED = "disconnected"
    TIMEOUT = "timeout"
    LEASE = "lease"
    REFUSED = "refused"
    UNSUPPORTED = "unsupported"
    TLS = "tls"


class TransferError(TandemError):
    """KV did not arrive (or not as it was sent); nothing of it may be used."""

    grpc_code = "UNAVAILABLE"
    http_status = 503
    retry_elsewhere = True

    def __init__(self, fault: TransferFault, message: str) -> None:
        super().__init__(message)
        self.fault = fault

"""Pure: whether a request is well formed; every field has its range, and an error names the field's path.

Both front doors use it; `path` turns the name of a field of SamplingParams into the name the client wrote.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

from router.request import ResumePoint
from router.served_model import ServedModel
from tandem.errors import InvalidRequest, PromptTooLong, UnknownModel
from tandem.sampling import SamplingParams
from tandem.v1 import inference_pb2 as pb

MAX_SAMPLES = 16
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_IDS = 64
MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_LOGPROBS = 20
MAX_PRIORITY = 100
MAX_MESSAGES = 4096
MAX_TIMEOUT_S = 86_400.0
ROLES = ("system", "developer", "user", "assistant", "tool")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Path = Callable[[str], str]

RANGES: Mapping[str, tuple[float, float, bool]] = MappingProxyType(
    {
        "temperature": (0.0, 2.0, True),
        "top_p": (0.0, 1.0, False),
        "top_k": (0, 2**31 - 1, True),
        "min_p": (0.0, 1.0, True),
        "presence_penalty": (-2.0, 2.0, True),
        "frequency_penalty": (-2.0, 2.0, True),
        "repetition_penalty": (0.0, 10.0, False),
        "n": (1, MAX_SAMPLES, True),
        "max_tokens": (1, 2**31 - 1, True),
        "min_tokens": (0, 2**31 - 1, True),
        "logprobs": (0, MAX_LOGPROBS, True),
        "seed": (0, 2**64 - 1, True),
    }
)
"""Field -> (lowest, highest, whether the lowest itself is allowed)."""


def check_sampling(params: SamplingParams, vocabulary_tokens: int, path: Path) -> None:
    """Raises InvalidRequest for the first field out of its range."""
    for name, (low, high, closed) in RANGES.items():
        value = getattr(params, name)
        if value is None or (low <= value <= high and (closed or value > low)):
            continue
        bracket = "[" if closed else "("
        raise InvalidRequest(f"{path(name)} must be in {bracket}{low:g}, {high:g}], not {value}.", path(name))
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"{path('min_tokens')} ({params.min_tokens}) must not exceed "
            f"{path('max_tokens')} ({params.max_tokens}).",
            path("min_tokens"),
        )
    _check_stops(params.stop, path("stop"))
    _check_at_most(len(params.stop_token_ids), MAX_STOP_IDS, path("stop_token_ids"))
    check_token_ids(params.stop_token_ids, vocabulary_tokens, path("stop_token_ids"))
    _check_biases(params.logit_bias, vocabulary_tokens, path("logit_bias"))


def _check_stops(stops: Sequence[str], field: str) -> None:
    _check_at_most(len(stops), MAX_STOPS, field)
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"Each of {field} must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(stop)}.", field
            )


def _check_biases(biases: Mapping[int, float], vocabulary_tokens: int, field: str) -> None:
    _check_at_most(len(biases), MAX_BIASES, field)
    check_token_ids(biases, vocabulary_tokens, field)
    for token_id, bias in biases.items():
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise InvalidRequest(
                f"{field}[{token_id}] must be in [{-MAX_BIAS:g}, {MAX_BIAS:g}], not {bias}.", field
            )


def _check_at_most(count: int, most: int, field: str) -> None:
    if count > most:
        raise InvalidRequest(f"{field} must have at most {most} entries, not {count}.", field)


def check_token_ids(token_ids: Iterable[int], vocabulary_tokens: int, field: str) -> None:
    """Raises InvalidRequest for the first id that the vocabulary does not have."""
    for token_id in token_ids:
        if not 0 <= token_id < vocabulary_tokens:
            raise InvalidRequest(
                f"{field} has the id {token_id}; the vocabulary has ids 0 to {vocabulary_tokens - 1}.", field
            )


def check_prompt_ids(token_ids: Sequence[int], model: ServedModel, field: str) -> None:
    """Raises InvalidRequest for an empty prompt or an id out of the vocabulary."""
    if not token_ids:
        raise InvalidRequest("The prompt must have at least one token.", field)
    check_length(len(token_ids), model, field)
    check_token_ids(token_ids, model.vocabulary_tokens, field)


def check_length(least_tokens: int, model: ServedModel, field: str) -> None:
    """Refuses a prompt that can't fit before any work is spent on it. Raises PromptTooLong."""
    if least_tokens > model.context_tokens:
        raise PromptTooLong(
            f"The model's context length is {model.context_tokens} tokens, but the prompt has at least "
            f"{least_tokens} tokens.",
            field,
        )


def check_chat(messages: Sequence[tuple[str, str]], field: str) -> None:
    """Raises InvalidRequest unless there are messages and each (role, content) has a known role."""
    if not messages:
        raise InvalidRequest("A conversation must have at least one message.", field)
    _check_at_most(len(messages), MAX_MESSAGES, field)
    for at, (role, _) in enumerate(messages):
        if role not in ROLES:
            raise InvalidRequest(
                f"{field}[{at}].role must be one of {', '.join(ROLES)}, not {role[:64]!r}.",
                f"{field}[{at}].role",
            )


def check_model(name: str, model: ServedModel) -> None:
    """Raises UnknownModel unless the name is empty or the served model's."""
    if name and name != model.name:
        raise UnknownModel(f"The model {name[:128]!r} does not exist; {model.name!r} is served here.")


def check_priority(priority: int) -> None:
    """Raises InvalidRequest for a priority out of range."""
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise InvalidRequest(
            f"priority must be in [{-MAX_PRIORITY}, {MAX_PRIORITY}], not {priority}.", "priority"
        )


def check_request_id(request_id: str) -> None:
    """Raises InvalidRequest for an id that is too long or has other characters than allowed."""
    if REQUEST_ID.fullmatch(request_id) is None:
        raise InvalidRequest("request_id must have 1 to 128 characters of [A-Za-z0-9._:-].", "request_id")


def slo_class_name(name: str, model: ServedModel) -> str:
    """The class to use. Raises InvalidRequest for an unknown one."""
    if not name:
        return model.default_slo_class
    if name not in model.slo_classes:
        known = ", ".join(sorted(model.slo_classes))
        raise InvalidRequest(f"slo_class must be one of {known}, not {name[:64]!r}.", "slo_class")
    return name


def timeout_from(timeout_s: float, model: ServedModel) -> float:
    """The time limit, never over the router's; 0 takes the router's. Raises InvalidRequest."""
    if not (math.isfinite(timeout_s) and 0.0 <= timeout_s <= MAX_TIMEOUT_S):
        raise InvalidRequest(f"timeout_s must be in [0, {MAX_TIMEOUT_S:g}], not {timeout_s}.", "timeout_s")
    return min(timeout_s, model.request_timeout_s) if timeout_s else model.request_timeout_s


def derived_seed(request_id: str) -> int:
    """The seed of a request that gave none: the same after a resume, at any router."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def resume_points(
    entries: Iterable[pb.ResumePoint], params: SamplingParams, model: ServedModel
) -> tuple[ResumePoint, ...]:
    """What the client has already. Raises InvalidRequest; `params.max_tokens` must be filled in."""
    points: dict[int, ResumePoint] = {}
    most = params.max_tokens or 0
    for at, entry in enumerate(entries):
        field = f"resume[{at}]"
        if entry.sample_index >= params.n or entry.sample_index in points:
            raise InvalidRequest(
                f"{field}.sample_index must name each of the {params.n} samples at most once.",
                f"{field}.sample_index",
            )
        if entry.next_index > most:
            raise InvalidRequest(
                f"{field}.next_index must be at most {most}, the most tokens of a sample.",
                f"{field}.next_index",
            )
        if entry.token_ids and len(entry.token_ids) != entry.next_index:
            raise InvalidRequest(
                f"{field}.token_ids must be empty or hold next_index ({entry.next_index}) ids, "
                f"not {len(entry.token_ids)}.",
                f"{field}.token_ids",
            )
        check_token_ids(entry.token_ids, model.vocabulary_tokens, f"{field}.token_ids")
        points[entry.sample_index] = ResumePoint(entry.sample_index, entry.next_index, tuple(entry.token_ids))
    return tuple(points.values())

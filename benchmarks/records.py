"""The two files of an arrival-rate run: the trace (what to send, when) and the results (what came back).

Both are JSON Lines: a header line that holds all settings, then one line per request. Times are seconds
from the start of the replay, on the client's monotonic clock.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_prinmix.errors import PrinMixError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TraceSettings(_Record):
    """Everything a trace is made from. ``tenants`` are in no particular order; ``rate`` is in requests/s,
    ``duration`` in seconds; prompt token ids are drawn below ``vocab_size``."""

    tenants: Annotated[tuple[str, ...], Field(min_length=1)]
    rate: Positive
    popularity: str
    duration: Positive
    prompt_tokens: Count
    output_tokens: Count
    vocab_size: Count
    seed: Annotated[int, Field(ge=0)]


class Request(_Record):
    """One request of a trace: sent ``arrival_s`` after the start, whatever became of those before it."""

    id: int
    arrival_s: Seconds
    tenant: str
    prompt: Annotated[list[TokenId], Field(min_length=1)]
    output_tokens: Count


class TraceHeader(_Record):
    kind: Literal["trace"] = "trace"
    version: Literal[1] = 1
    requests: Count
    settings: TraceSettings


class RequestResult(_Record):
    """What became of one request. ``error`` is None for a completed request and only then ``ttft_s`` and
    ``e2e_s`` (from the send to the first and to the last token) are numbers."""

    id: int
    tenant: str
    arrival_s: float
    sent_s: float
    finished_s: float
    ttft_s: float | None
    e2e_s: float | None
    error: str | None

    @property
    def late_s(self) -> float:
        """How long after its time the client sent the request, in seconds."""
        return self.sent_s - self.arrival_s


class ResultsHeader(_Record):
    kind: Literal["results"] = "results"
    version: Literal[1] = 1
    requests: Count
    settings: TraceSettings
    trace_sha256: str
    url: str
    timeout_s: float
    started: str  # wall clock, ISO 8601, UTC; for people only: no figure is computed from it


@dataclass(frozen=True)
class Trace:
    settings: TraceSettings
    requests: list[Request]
    sha256: str  # of the file's bytes


@dataclass(frozen=True)
class Results:
    header: ResultsHeader
    requests: list[RequestResult]


Model = TypeVar("Model", bound=BaseModel)
Header = TypeVar("Header", TraceHeader, ResultsHeader)
Row = TypeVar("Row", Request, RequestResult)


def write_trace(path: Path, settings: TraceSettings, requests: Sequence[Request]) -> str:
    """Write a trace file and return its sha256 in hex. Equal settings and requests give equal bytes."""
    if not requests:
        raise PrinMixError(
            "the trace has no requests",
            where=path,
            found=f"rate {settings.rate:g}/s over {settings.duration:g} s",
            fix="raise --rate or --duration",
        )
    return _write(path, TraceHeader(requests=len(requests), settings=settings), requests)


def read_trace(path: Path) -> Trace:
    """Read and check a trace file; raises PrinMixError with the line that is wrong."""
    header, requests, sha256 = _read(path, TraceHeader, Request)
    return Trace(header.settings, requests, sha256)


def write_results(path: Path, results: Results) -> None:
    """Write a results file."""
    _write(path, results.header, results.requests)


def read_results(path: Path) -> Results:
    """Read and check a results file; raises PrinMixError with the line that is wrong."""
    header, requests, _ = _read(path, ResultsHeader, RequestResult)
    return Results(header, requests)


def write_file(path: Path, data: bytes) -> None:
    """Write a file and the folders above it; raises PrinMixError when that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise PrinMixError("the file cannot be written", where=path, found=error) from None


def validated(model: type[Model], values: dict, where: object) -> Model:
    """``model(**values)``; for a bad field raises PrinMixError that names it and ``where`` it came from."""
    try:
        return model(**values)
    except ValidationError as error:
        raise _invalid(error, where) from None


def _invalid(error: ValidationError, where: object) -> PrinMixError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    return PrinMixError(
        f"{field or 'the line'} is not valid",
        where=where,
        found=repr(first["input"])[:80],
        expected=first["msg"],
    )


def _write(path: Path, header: BaseModel, rows: Sequence[BaseModel]) -> str:
    data = "".join(row.model_dump_json() + "\n" for row in (header, *rows)).encode()
    write_file(path, data)
    return hashlib.sha256(data).hexdigest()


def _read(path: Path, header_type: type[Header], row_type: type[Row]) -> tuple[Header, list[Row], str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PrinMixError("the file cannot be read", where=path, found=error) from None
    number = 1
    try:
        first, *rest = data.splitlines() or [b""]
        header = header_type.model_validate_json(first)
        rows = []
        for number, line in enumerate(rest, start=2):  # noqa: B007 - the except clause names the line
            rows.append(row_type.model_validate_json(line))
    except ValidationError as error:
        raise _invalid(error, f"{path}, line {number}") from None
    if len(rows) != header.requests:
        raise PrinMixError(
            "the file is incomplete",
            where=path,
            found=f"{len(rows)} requests",
            expected=f"{header.requests} requests, as its first line says",
            fix="make it again",
        )
    return header, rows, hashlib.sha256(data).hexdigest()

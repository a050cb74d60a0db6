"""Replay a trace against an OpenAI-compatible server, open loop, and record what became of every request.

Open loop: each request is sent at its own time, however many are still unanswered, so that a slow
server meets the same load as a fast one. The requests go through vLLM's own benchmark client
(vllm.benchmarks.lib.endpoint_request_func), whose monotonic clock gives time to first token and to last.
"""

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator, Collection, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, cast

import aiohttp
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.records import Request, RequestResult, Results, ResultsHeader, Trace
from vllm_prinmix.errors import PrinMixError

if TYPE_CHECKING:
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput

DISCOVERY_TIMEOUT_S = 30


async def list_models(url: str) -> dict[str, str | None]:
    """The models of /v1/models: name -> its parent (the base model's name), or None for a base model.

    Raises PrinMixError when nothing answers at ``url``, or something that is no OpenAI-compatible server.
    """
    models_url = f"{url.rstrip('/')}/v1/models"
    try:
        async with _session(DISCOVERY_TIMEOUT_S) as session, session.get(models_url) as response:
            models = (await response.json())["data"]
            return {model["id"]: model.get("parent") for model in models}
    except (aiohttp.ClientConnectionError, aiohttp.NonHttpUrlClientError, TimeoutError) as error:
        raise PrinMixError(
            "the server cannot be reached",
            where=models_url,
            found=str(error) or type(error).__name__,
            fix="start it (vllm serve ...), wait until it listens, or give --url http://HOST:PORT",
        ) from None
    except (PrinMixError, aiohttp.ClientError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise PrinMixError(
            "the server does not list its models",
            where=models_url,
            found=error,
            expected="the JSON answer of an OpenAI-compatible server",
            fix="give the address of a vLLM server with --url; OPENAI_API_KEY is sent where it is set",
        ) from None


def pick_tenants(models: Mapping[str, str | None], include_base: bool = False) -> list[str]:
    """The models that have a parent and, if asked, those that have none; raises PrinMixError if no tenant."""
    tenants = [name for name, parent in models.items() if parent is not None]
    if not tenants:
        raise PrinMixError(
            "the server lists no tenant (a model with a parent)",
            where="/v1/models",
            found=", ".join(models) or "no model at all",
            fix="serve some deltas (--deltas DIR), or name the models to send to with --tenants a,b",
        )
    return list(models) if include_base else tenants


def check_served(models: Mapping[str, str | None], tenants: Collection[str]) -> None:
    """Raise PrinMixError if one of ``tenants`` is not among the server's models."""
    missing = sorted(set(tenants) - set(models))
    if missing:
        raise PrinMixError(
            f"the server does not serve {', '.join(missing)}",
            where="/v1/models",
            found=", ".join(models),
            expected=f"all of {', '.join(sorted(tenants))}",
            fix="serve those deltas, or choose other tenants or another trace",
        )


async def replay(trace: Trace, url: str, *, timeout_s: float = 600.0, progress: bool = True) -> Results:
    """Send every request of ``trace`` at its time and wait for all; results in the trace's order.

    A request fails that is refused, breaks off, returns another number of tokens than asked, or is not
    complete ``timeout_s`` seconds after its send. Failures are results, not exceptions.
    """
    try:
        from vllm.benchmarks.lib import endpoint_request_func as client
    except ImportError as error:
        raise PrinMixError(
            "the replay needs vLLM's benchmark client",
            found=error,
            fix="install vllm (the extra `cpu` or `cuda` of this package)",
        ) from None

    # A trace replayed twice repeats its prompts. The salt keeps the server's prefix cache from answering
    # the second replay out of the first.
    cache_salt = uuid.uuid4().hex
    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed, {task.fields[flying]} in flight"),
        TimeElapsedColumn(),
    )

    failed = flying = 0

    async def send(request: Request) -> RequestResult:
        nonlocal failed, flying
        await asyncio.sleep(start + request.arrival_s - time.perf_counter())
        flying += 1
        bar.update(task, flying=flying)
        output = client.RequestFuncOutput()
        sent = time.perf_counter() - start
        try:
            async with asyncio.timeout(timeout_s):
                output = await client.async_request_openai_completions(
                    client.RequestFuncInput(
                        prompt=request.prompt,
                        api_url=f"{url.rstrip('/')}/v1/completions",
                        prompt_len=len(request.prompt),
                        output_len=request.output_tokens,
                        model=request.tenant,
                        ignore_eos=True,
                        extra_body={
                            "min_tokens": request.output_tokens,
                            "temperature": 0,
                            "cache_salt": cache_salt,
                        },
                    ),
                    session,
                )
            error = _failure(request, output)
        except TimeoutError:
            error = f"timeout: not complete after {timeout_s:g} s"
        finished = time.perf_counter() - start
        flying -= 1
        failed += error is not None
        bar.update(task, advance=1, flying=flying, failed=failed)
        return RequestResult(
            id=request.id,
            tenant=request.tenant,
            arrival_s=request.arrival_s,
            sent_s=sent,
            finished_s=finished,
            ttft_s=output.ttft if error is None else None,
            e2e_s=output.latency if error is None else None,
            error=error,
        )

    started = datetime.now(UTC).isoformat(timespec="seconds")
    with Progress(*columns, refresh_per_second=4, disable=not progress) as bar:
        task = bar.add_task("", total=len(trace.requests), failed=0, flying=0)
        async with _session() as session:
            start = time.perf_counter()
            results = await asyncio.gather(*(send(request) for request in trace.requests))
    header = ResultsHeader(
        requests=len(results),
        settings=trace.settings,
        trace_sha256=trace.sha256,
        url=url,
        timeout_s=timeout_s,
        started=started,
    )
    return Results(header, list(results))


def _session(timeout_s: float | None = None) -> aiohttp.ClientSession:
    # No limit on connections, or the client would queue requests and close the loop. A new connection
    # for each request: a kept one may be closed by the server at the very moment it is used again.
    key = os.environ.get("OPENAI_API_KEY")
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        headers={"Authorization": f"Bearer {key}"} if key else None,
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        raise_for_status=_keep_reason,
    )


async def _keep_reason(response: aiohttp.ClientResponse) -> None:
    # vLLM's client keeps only the status's name of a refusal and nothing of an error event in a stream;
    # it does keep the text of an exception. The server's words say which tenant failed and why.
    if response.status != 200:
        raise PrinMixError(f"HTTP {response.status}: {_one_line(await response.read())}")
    response.content = cast(aiohttp.StreamReader, _EventStream(response.content))


class _EventStream:
    """A response's stream, broken off with a PrinMixError where the server reports an error in it."""

    def __init__(self, stream: aiohttp.StreamReader) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    async def iter_any(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream.iter_any():
            start = chunk.find(b'data: {"error":')
            if start >= 0:
                event = chunk[start:].partition(b"\n")[0]
                raise PrinMixError(f"error in the stream: {_one_line(event.removeprefix(b'data: '))}")
            yield chunk


def _one_line(text: bytes) -> str:
    return " ".join(text.decode(errors="replace").split())[:500]


def _failure(request: Request, output: "RequestFuncOutput") -> str | None:
    """Why a request of vLLM's client failed, in one line; None if it completed."""
    if not output.success:
        # The client gives a whole traceback; its last line is the exception.
        line = output.error.strip().rpartition("\n")[2] or "no answer"
        return line.removeprefix(f"{PrinMixError.__module__}.{PrinMixError.__name__}: ")
    if output.output_tokens != request.output_tokens:
        return f"the stream ended with {output.output_tokens} of {request.output_tokens} tokens counted"
    if output.prompt_len != len(request.prompt):
        return f"the server read {output.prompt_len} prompt tokens, {len(request.prompt)} were sent"
    return None

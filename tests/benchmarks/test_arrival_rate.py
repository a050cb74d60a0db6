"""The arrival-rate benchmark: the trace's laws, the report's figures, and the replay of a trace against
a small OpenAI-compatible server whose every answer is known."""

import asyncio
import hashlib
import json
import math
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from aiohttp import web
from typer.testing import CliRunner

from benchmarks import arrival_rate
from benchmarks.records import (
    Request,
    RequestResult,
    Results,
    ResultsHeader,
    Trace,
    TraceSettings,
    read_results,
    read_trace,
    write_results,
    write_trace,
)
from benchmarks.replay import list_models, pick_tenants, replay
from benchmarks.report import plot, summarize
from benchmarks.trace import make_trace, popularity_law, rank_tenants
from vllm_prinmix.errors import PrinMixError

SETTINGS = TraceSettings(
    tenants=("ada", "bob", "cyd"),
    rate=5,
    popularity="zipf:1.5",
    duration=10,
    prompt_tokens=24,
    output_tokens=2,
    vocab_size=500,
    seed=3,
)


def settings(**changes) -> TraceSettings:
    return SETTINGS.model_copy(update=changes)


# --- the trace ---------------------------------------------------------------------------------------


def test_equal_settings_give_equal_bytes_and_another_seed_gives_others(tmp_path):
    hashes = [
        write_trace(tmp_path / name, chosen, make_trace(chosen))
        for name, chosen in (("a", SETTINGS), ("b", SETTINGS), ("c", settings(seed=4)))
    ]
    assert hashes[0] == hashes[1] != hashes[2]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert hashes[0] == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_trace_file_holds_the_settings_first_and_reads_back_whole(tmp_path):
    path = tmp_path / "trace.jsonl"
    requests = make_trace(SETTINGS)
    sha256 = write_trace(path, SETTINGS, requests)
    header = json.loads(path.read_text().splitlines()[0])
    assert header["settings"] == json.loads(SETTINGS.model_dump_json())
    assert read_trace(path) == Trace(SETTINGS, requests, sha256)


def test_arrivals_are_poisson():
    chosen = settings(rate=20, duration=400, prompt_tokens=1)
    arrivals = np.array([request.arrival_s for request in make_trace(chosen)])
    expected = 20 * 400
    assert abs(len(arrivals) - expected) < 4 * math.sqrt(expected)
    assert arrivals[-1] < 400
    gaps = np.diff(arrivals, prepend=0.0)
    assert (gaps >= 0).all()
    # An exponential law has its mean as standard deviation, and exceeds t with probability exp(-rate t).
    assert gaps.std() == pytest.approx(1 / 20, rel=0.05)
    for t in (0.01, 0.05, 0.1):
        p = math.exp(-20 * t)
        assert abs((gaps > t).mean() - p) < 4 * math.sqrt(p * (1 - p) / expected)


@pytest.mark.parametrize("popularity", ["uniform", "zipf:1.5"])
def test_tenants_are_drawn_by_the_law(popularity):
    names = tuple(f"t{number}" for number in range(8))
    chosen = settings(rate=20, duration=150, prompt_tokens=1, tenants=names, popularity=popularity)
    requests = make_trace(chosen)
    counts = Counter(request.tenant for request in requests)
    for name, p in zip(rank_tenants(chosen), popularity_law(popularity, 8), strict=True):
        assert abs(counts[name] - p * len(requests)) < 4 * math.sqrt(p * (1 - p) * len(requests))


def test_popularity_probabilities_are_exact():
    np.testing.assert_allclose(popularity_law("uniform", 4), [1 / 4] * 4, rtol=1e-15)
    np.testing.assert_allclose(popularity_law("zipf:1", 3), [6 / 11, 3 / 11, 2 / 11], rtol=1e-15)
    np.testing.assert_allclose(popularity_law("zipf:2", 2), [4 / 5, 1 / 5], rtol=1e-15)
    weights = [k**-1.5 for k in range(1, 33)]
    expected = [weight / math.fsum(weights) for weight in weights]
    np.testing.assert_allclose(popularity_law("zipf:1.5", 32), expected, rtol=1e-14)


@pytest.mark.parametrize("popularity", ["zipf", "zipf:", "zipf:x", "zipf:-1", "zipf:nan", "zipf:inf", "1.5"])
def test_unknown_popularity_is_refused(popularity):
    with pytest.raises(PrinMixError, match="--popularity") as caught:
        popularity_law(popularity, 3)
    assert caught.value.found == popularity


def test_popular_names_depend_on_the_seed_and_not_on_the_order_of_listing():
    names = tuple(f"t{number}" for number in range(8))
    ranked = rank_tenants(settings(tenants=names))
    assert sorted(ranked) == sorted(names)
    assert ranked == rank_tenants(settings(tenants=names[::-1]))
    assert ranked != rank_tenants(settings(tenants=names, seed=4))


def test_prompts_have_their_length_and_no_two_share_a_block():
    requests = make_trace(SETTINGS)
    assert all(len(request.prompt) == 24 for request in requests)
    assert all(0 <= token < 500 for request in requests for token in request.prompt)
    assert len({tuple(request.prompt[:16]) for request in requests}) == len(requests)


def test_another_prompt_length_keeps_arrivals_and_tenants():
    def when_and_who(chosen):
        return [(request.arrival_s, request.tenant) for request in make_trace(chosen)]

    assert when_and_who(SETTINGS) == when_and_who(settings(prompt_tokens=7, output_tokens=5))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:-1], "the file is incomplete"),
        (lambda lines: [*lines[:2], lines[2][:40], *lines[3:]], "line 3"),
        (lambda lines: [lines[0].replace('"trace"', '"results"'), *lines[1:]], "kind is not valid"),
        (lambda lines: [lines[0].replace('"version":1', '"version":9'), *lines[1:]], "version is not valid"),
        (lambda lines: [lines[0], lines[1].replace('{"id"', '{"x":0,"id"'), *lines[2:]], "x is not valid"),
        (lambda lines: [], "line 1"),
    ],
    ids=["truncated", "broken-line", "other-kind", "other-version", "unknown-field", "empty"],
)
def test_damaged_trace_is_refused(tmp_path, damage, message):
    path = tmp_path / "trace.jsonl"
    write_trace(path, SETTINGS, make_trace(SETTINGS))
    path.write_text("\n".join(damage(path.read_text().splitlines())))
    with pytest.raises(PrinMixError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_missing_and_empty_traces_are_refused(tmp_path):
    with pytest.raises(PrinMixError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(PrinMixError, match="has no requests"):
        write_trace(tmp_path / "trace.jsonl", SETTINGS, [])


# --- the report --------------------------------------------------------------------------------------


def result(number: int, tenant: str, arrival: float, ttft: float | None, e2e: float | None) -> RequestResult:
    return RequestResult(
        id=number,
        tenant=tenant,
        arrival_s=arrival,
        sent_s=arrival + 0.001 * number,
        finished_s=arrival + (e2e or 1.0),
        ttft_s=ttft,
        e2e_s=e2e,
        error="HTTP 500: no" if e2e is None else None,
    )


def results_of(*requests: RequestResult) -> Results:
    header = ResultsHeader(
        requests=len(requests),
        settings=SETTINGS,
        trace_sha256="0" * 64,
        url="http://localhost:1",
        timeout_s=60,
        started="2026-01-01T00:00:00+00:00",
    )
    return Results(header, list(requests))


HAND_MADE = results_of(
    result(0, "ada", 0.0, 0.1, 0.4),
    result(1, "bob", 1.0, 0.2, 0.8),
    result(2, "ada", 2.0, 0.3, 0.6),
    result(3, "ada", 3.0, None, None),
    result(4, "bob", 8.0, 0.4, 8.0),
)


def test_report_against_a_hand_computation():
    report = summarize(HAND_MADE)
    # The trace lasts 10 s and the last answer comes at 16 s.
    assert report.window_s == 16
    run = report.run
    assert (run.requests, run.completed, run.failed) == (5, 4, 1)
    assert run.throughput == 4 / 16
    assert run.e2e_s.mean_completed == pytest.approx((0.4 + 0.8 + 0.6 + 8.0) / 4)
    # Sorted: 0.4 0.6 0.8 8.0 failed. At least half is the third; 90 % and 99 % need the failed fifth.
    assert (run.e2e_s.p50, run.e2e_s.p90, run.e2e_s.p99) == (0.8, None, None)
    assert (run.ttft_s.p50, run.ttft_s.p90, run.ttft_s.p99) == (0.3, None, None)

    bob = report.tenants["bob"]
    assert (bob.requests, bob.completed, bob.failed, bob.throughput) == (2, 2, 0, 2 / 16)
    assert (bob.e2e_s.p50, bob.e2e_s.p90, bob.e2e_s.p99) == (0.8, 8.0, 8.0)
    assert report.tenants["ada"].ttft_s.p50 == 0.3
    assert report.tenants["cyd"].requests == 0
    assert report.tenants["cyd"].e2e_s.p50 is None

    assert list(report.tenants) == rank_tenants(SETTINGS)
    assert report.failures == {"HTTP 500: no": 1}
    assert report.late_p50_s == pytest.approx(0.002)
    assert report.late_max_s == pytest.approx(0.004)


def test_a_server_that_dies_early_gains_no_throughput():
    report = summarize(results_of(result(0, "ada", 0.0, 0.1, 0.1), result(1, "ada", 9.0, None, None)))
    assert report.run.throughput == 1 / 10


def test_results_read_back_whole(tmp_path):
    write_results(tmp_path / "results.jsonl", HAND_MADE)
    assert read_results(tmp_path / "results.jsonl") == HAND_MADE


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(3, 4)], ids=["one", "all-failed"])
def test_plot_is_a_png_of_readable_size(tmp_path, chosen):
    plot(results_of(*HAND_MADE.requests[chosen]), tmp_path / "deep" / "report.png")
    data = (tmp_path / "deep" / "report.png").read_bytes()
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    assert data.startswith(b"\x89PNG")
    assert min(width, height) >= 800


def test_trace_and_report_work_without_vllm():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('vllm', 'aiohttp', 'torch')))\n"
        "import benchmarks.trace, benchmarks.report"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(arrival_rate.__file__).parents[1], timeout=60
    )


# --- the replay --------------------------------------------------------------------------------------

DELAY_S = 0.05  # before the first token
GAP_S = 0.02  # between tokens


class FakeServer:
    """Answers /v1/completions as vLLM streams it. Tenants: `ada` and `bob` answer after DELAY_S, `together`
    only once two requests wait at the same time, `broken` with HTTP 500, `cut` with an error event
    after the first token, `short` with one token too few, `silent` never. `base` has no parent."""

    def __init__(self) -> None:
        self.tenants = ["ada", "bob", "together", "broken", "cut", "short", "silent"]
        self.payloads: list[dict] = []
        self.together: list[asyncio.Event] = []

    async def models(self, request: web.Request) -> web.Response:
        cards = [{"id": "base", "parent": None}, *({"id": name, "parent": "base"} for name in self.tenants)]
        return web.json_response({"object": "list", "data": cards})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        payload = await request.json()
        self.payloads.append(payload)
        tenant = payload["model"]
        tokens = payload["max_tokens"] - (tenant == "short")
        if tenant == "broken":
            return web.json_response({"error": {"message": "delta of broken: digest differs"}}, status=500)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if tenant == "silent":
            await asyncio.Event().wait()
        if tenant == "together":
            await self.wait_for_the_other()
        await asyncio.sleep(DELAY_S)
        for number in range(tokens):
            if number:
                await asyncio.sleep(GAP_S)
            await self.event(response, {"choices": [{"index": 0, "text": "x"}]})
            if tenant == "cut":
                await self.event(response, {"error": {"message": "the engine failed", "code": 500}})
                break
        else:
            usage = {"prompt_tokens": len(payload["prompt"]), "completion_tokens": tokens}
            await self.event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def wait_for_the_other(self) -> None:
        self.together.append(asyncio.Event())
        if len(self.together) == 2:
            for event in self.together:
                event.set()
        await self.together[-1].wait()

    @staticmethod
    async def event(response: web.StreamResponse, data: dict) -> None:
        await response.write(f"data: {json.dumps(data)}\n\n".encode())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, ready: threading.Event) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.add_routes([web.get("/v1/models", self.models), web.post("/v1/completions", self.completions)])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        ready.set()
        await self.stop.wait()
        await runner.cleanup()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake, ready = FakeServer(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(fake.serve(ready)))
    thread.start()
    assert ready.wait(10)
    yield fake
    fake.loop.call_soon_threadsafe(fake.stop.set)
    thread.join(10)


def trace_of(*tenants: str, output_tokens: int = 3) -> Trace:
    """A trace by hand: one request for each name given, 10 ms apart."""
    chosen = settings(tenants=tuple(sorted(set(tenants))), output_tokens=output_tokens, duration=1.0)
    requests = [
        Request(id=n, arrival_s=0.01 * n, tenant=name, prompt=[n, 7, 8, 9], output_tokens=output_tokens)
        for n, name in enumerate(tenants)
    ]
    return Trace(chosen, requests, "0" * 64)


async def test_completed_and_failed_requests_are_told_apart(server):
    trace = trace_of("ada", "broken", "silent", "cut", "bob", "ada", "short")
    results = await replay(trace, server.url, timeout_s=2, progress=False)
    errors = [result.error for result in results.requests]
    assert [result.tenant for result in results.requests] == [request.tenant for request in trace.requests]
    assert [index for index, error in enumerate(errors) if error is None] == [0, 4, 5]
    assert errors[1] == 'HTTP 500: {"error": {"message": "delta of broken: digest differs"}}'
    assert errors[2] == "timeout: not complete after 2 s"
    assert errors[3] == 'error in the stream: {"error": {"message": "the engine failed", "code": 500}}'
    assert errors[6] == "the stream ended with 2 of 3 tokens counted"
    for request in results.requests:
        assert request.late_s >= 0
        if request.error is None:
            assert DELAY_S <= request.ttft_s <= request.e2e_s
            assert request.e2e_s <= request.finished_s - request.sent_s
        else:
            assert request.ttft_s is request.e2e_s is None

    report = summarize(results)
    assert (report.run.completed, report.run.failed) == (3, 4)
    assert report.tenants["ada"].completed == 2
    assert report.tenants["silent"].e2e_s.p50 is None
    assert set(report.failures) == set(errors) - {None}


async def test_requests_are_sent_at_their_time_whatever_is_unanswered(server):
    # The server answers neither until it has both: a client that waits for answers never finishes.
    results = await replay(trace_of("together", "together"), server.url, timeout_s=5, progress=False)
    assert [result.error for result in results.requests] == [None, None]


async def test_requests_carry_the_trace_and_no_replay_hits_the_cache_of_another(server):
    trace = trace_of("ada", "bob", output_tokens=1)
    for _ in range(2):
        await replay(trace, server.url, timeout_s=5, progress=False)
    assert len(server.payloads) == 4
    for payload in server.payloads:
        assert payload["prompt"] in [request.prompt for request in trace.requests]
        assert (payload["max_tokens"], payload["min_tokens"], payload["ignore_eos"]) == (1, 1, True)
    assert len({payload["cache_salt"] for payload in server.payloads}) == 2


async def test_failed_connections_are_failed_requests(unused_tcp_port):
    results = await replay(
        trace_of("ada"), f"http://127.0.0.1:{unused_tcp_port}", timeout_s=5, progress=False
    )
    assert "Cannot connect" in results.requests[0].error


async def test_tenants_are_the_models_with_a_parent_and_the_base_only_if_asked(server):
    server.tenants = ["ada", "bob"]
    models = await list_models(server.url + "/")
    assert models == {"base": None, "ada": "base", "bob": "base"}
    assert pick_tenants(models) == ["ada", "bob"]
    assert pick_tenants(models, include_base=True) == ["base", "ada", "bob"]


async def test_models_of_something_that_is_no_openai_server(server):
    with pytest.raises(PrinMixError, match=r"does not list its models.*HTTP 404"):
        await list_models(server.url + "/elsewhere")


# --- the command -------------------------------------------------------------------------------------


def command(*arguments: object):
    app = typer.Typer()
    app.command()(arrival_rate.main)
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(argument) for argument in arguments])


def test_command_end_to_end(server, tmp_path):
    server.tenants = ["ada", "bob", "broken"]
    done = command(
        *("--url", server.url, "--rate", 15, "--duration", 2, "--prompt-tokens", 32, "--timeout", 5),
        *("--out", tmp_path),
    )
    assert done.exit_code == 0, done.output
    trace = read_trace(tmp_path / "trace.jsonl")
    report = json.loads((tmp_path / "report.json").read_text())
    counts = Counter(request.tenant for request in trace.requests)
    assert set(counts) == {"ada", "bob", "broken"}
    assert trace.sha256 == report["trace_sha256"]
    assert trace.sha256 in done.output
    assert report["run"]["requests"] == len(trace.requests)
    assert report["run"]["failed"] == report["tenants"]["broken"]["failed"] == counts["broken"]
    assert report["run"]["completed"] == counts["ada"] + counts["bob"]
    assert report["run"]["ttft_s"]["p50"] >= DELAY_S
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert len(read_results(tmp_path / "results.jsonl").requests) == len(trace.requests)
    assert f"{counts['broken']} failed: HTTP 500" in done.output


def test_command_replays_an_existing_trace(server, tmp_path):
    trace = trace_of("ada", "bob", "ada")
    sha256 = write_trace(tmp_path / "old.jsonl", trace.settings, trace.requests)
    done = command("--url", server.url, "--trace", tmp_path / "old.jsonl", "--out", tmp_path / "new")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["trace_sha256"] == sha256
    assert {name: stats["completed"] for name, stats in report["tenants"].items()} == {"ada": 2, "bob": 1}
    assert not (tmp_path / "new" / "trace.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--popularity", "zipf:much"), "unknown popularity law"),
        (("--rate", "0"), "rate is not valid"),
        (("--output-tokens", "0"), "output_tokens is not valid"),
        (("--rate", "0.001", "--duration", "0.001"), "the trace has no requests"),
        (("--tenants", "ada,zoe"), "the server does not serve zoe"),
        (("--tenants", "broken", "--duration", "0.5", "--rate", "20"), "no request was completed"),
        (("--trace", "old.jsonl", "--rate", "2"), "a trace file holds its own settings"),
        (("--trace", "none.jsonl"), "the file cannot be read"),
    ],
)
def test_bad_options_are_one_clear_error(server, tmp_path, options, message):
    done = command("--url", server.url, "--out", tmp_path, *options)
    assert done.exit_code == 1
    assert f"error: {message}" in done.output


def test_a_server_without_tenants_is_one_clear_error(server, tmp_path):
    server.tenants = []
    done = command("--url", server.url, "--out", tmp_path)
    assert done.exit_code == 1
    assert "error: the server lists no tenant" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "127.0.0.1:{port}"], ids=["nobody", "no-scheme"])
def test_a_server_that_cannot_be_reached_is_one_clear_error(unused_tcp_port, tmp_path, url):
    done = command("--url", url.format(port=unused_tcp_port), "--out", tmp_path)
    assert done.exit_code == 1
    assert "error: the server cannot be reached" in done.output

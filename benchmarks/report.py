"""Figures and pictures from the results of a replay.

A failed request counts as infinitely slow: it is never a fast one, and a percentile that falls among
the failed requests has no value (null in JSON).
"""

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure  # without pyplot: no display is looked for, nothing global is kept
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from pydantic import BaseModel
from rich import box
from rich.table import Table

from benchmarks.records import RequestResult, Results, TraceSettings, write_file
from benchmarks.trace import rank_tenants

TTFT_COLOUR, E2E_COLOUR, FAILED_COLOUR = "tab:orange", "tab:blue", "tab:red"


class Latency(BaseModel):
    """Seconds. Percentiles are over all requests, None where they fall among the failed ones; the mean
    (the paper's "E2E averaged") can only be over the completed ones. All None without requests."""

    mean_completed: float | None
    p50: float | None
    p90: float | None
    p99: float | None


class Stats(BaseModel):
    """One row of the report. Throughput is in completed requests/s over the run's ``window_s``."""

    requests: int
    completed: int
    failed: int
    throughput: float
    e2e_s: Latency
    ttft_s: Latency


class Report(BaseModel):
    """The report of one replay: the whole run, every tenant (most popular first), why requests failed,
    and how late the client itself sent (``late_*_s``; these figures judge the client, not the server)."""

    settings: TraceSettings
    trace_sha256: str
    url: str
    started: str
    timeout_s: float
    window_s: float
    late_p50_s: float
    late_max_s: float
    run: Stats
    tenants: dict[str, Stats]
    failures: dict[str, int]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of ``values`` that at least ``percent`` % of them do not exceed (nearest rank).

    A value that was really measured, so it stays meaningful when some values are infinite.
    """
    return float(np.percentile(values, percent, method="inverted_cdf"))


def summarize(results: Results) -> Report:
    """Compute the report. The window of all throughputs runs from the trace's start to its nominal end
    or to the last completed request, whichever is later: a server that dies early gains nothing."""
    header, requests = results.header, results.requests
    completed_at = [result.finished_s for result in requests if result.error is None]
    window_s = max([header.settings.duration, *completed_at])
    late = [result.late_s for result in requests]
    return Report(
        settings=header.settings,
        trace_sha256=header.trace_sha256,
        url=header.url,
        started=header.started,
        timeout_s=header.timeout_s,
        window_s=window_s,
        late_p50_s=percentile(late, 50),
        late_max_s=max(late),
        run=_stats(requests, window_s),
        tenants={
            tenant: _stats([result for result in requests if result.tenant == tenant], window_s)
            for tenant in rank_tenants(header.settings)
        },
        failures=dict(Counter(result.error for result in requests if result.error).most_common()),
    )


def table(report: Report) -> Table:
    """The report as a table for the terminal, times in seconds, with notes on failures below it."""
    title = f"{report.url}, {_describe(report.settings)}; times in s"
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    grid.add_column("tenant", overflow="fold")
    for name in ("sent", "failed", "req/s"):
        grid.add_column(name, justify="right")
    for name in ("TTFT", "E2E"):
        for figure in ("p50", "p90", "p99"):
            grid.add_column(f"{name}\n{figure}", justify="right")
    for name, stats in report.tenants.items():
        grid.add_row(name, *_cells(stats))
    grid.add_section()
    grid.add_row("whole run", *_cells(report.run))
    notes = [f"The client sent its latest request {1e3 * report.late_max_s:.1f} ms late."]
    notes += [f"{count} failed: {reason[:200]}" for reason, count in list(report.failures.items())[:5]]
    grid.caption = "\n".join(notes)
    grid.caption_justify = "left"
    return grid


def _cells(stats: Stats) -> list[str]:
    times = [time for each in (stats.ttft_s, stats.e2e_s) for time in (each.p50, each.p90, each.p99)]
    return [
        str(stats.requests),
        str(stats.failed),
        f"{stats.throughput:.3g}",
        *("-" if time is None else f"{time:.3g}" for time in times),
    ]


def plot(results: Results, path: Path) -> None:
    """Draw the run as a PNG: the distribution of latencies, latencies over time, arrivals against
    completions, and the requests of each tenant. Raises PrinMixError if the file cannot be written."""
    requests, tenants = results.requests, rank_tenants(results.header.settings)
    completed = sum(result.error is None for result in requests)
    lower = max(4.0, 1 + 0.2 * len(tenants))  # inches; the last panel has a line for each tenant
    figure = Figure(figsize=(13, 5 + lower), layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=(4, lower))
    figure.suptitle(
        f"{_describe(results.header.settings)}\n"
        f"{completed} of {len(requests)} requests completed, {len(requests) - completed} failed"
    )
    _plot_distribution(axes[0, 0], requests)
    _plot_latencies(axes[0, 1], requests)
    _plot_backlog(axes[1, 0], requests)
    _plot_tenants(axes[1, 1], requests, tenants)
    end = max([results.header.settings.duration, *(result.finished_s for result in requests)])
    for axis in (axes[0, 1], axes[1, 0], axes[1, 1]):
        axis.set_xlim(0, 1.02 * end)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_file(path, picture.getvalue())


def _plot_distribution(axis: Axes, requests: Sequence[RequestResult]) -> None:
    # The later curve is the thinner: with one output token both times are equal and both stay visible.
    axis.ecdf(_ttft(requests), label="time to first token", color=TTFT_COLOUR, lw=4, alpha=0.6)
    axis.ecdf(_e2e(requests), label="end to end", color=E2E_COLOUR, lw=1.5)
    completed = sum(result.error is None for result in requests) / len(requests)
    if completed < 1:
        axis.axhline(completed, color=FAILED_COLOUR, ls=":", label="completed")
    axis.set_ylim(0, 1.02)
    if _spans_decades(requests):
        axis.set_xscale("log")
        _plain_ticks(axis.xaxis)
    _label(axis, "Latency (ECDF)", "latency (s)", "share of all requests")


def _plot_latencies(axis: Axes, requests: Sequence[RequestResult]) -> None:
    axis.margins(y=0.15)
    arrivals = [result.arrival_s for result in requests]
    axis.scatter(
        arrivals, _ttft(requests), s=45, alpha=0.6, lw=0, color=TTFT_COLOUR, label="time to first token"
    )
    axis.scatter(arrivals, _e2e(requests), s=9, lw=0, color=E2E_COLOUR, label="end to end")
    failed = [result.arrival_s for result in requests if result.error is not None]
    if failed:
        top = axis.get_xaxis_transform()  # x in seconds, y as a share of the panel's height
        axis.scatter(
            failed, [0.96] * len(failed), marker="x", color=FAILED_COLOUR, label="failed", transform=top
        )
    if _spans_decades(requests):
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)
    else:
        axis.set_ylim(bottom=0)
    _label(axis, "Latency by arrival", "arrival since the start (s)", "latency (s)")


def _plot_backlog(axis: Axes, requests: Sequence[RequestResult]) -> None:
    arrived = sorted(result.arrival_s for result in requests)
    completed = sorted(result.finished_s for result in requests if result.error is None)
    end = max(result.finished_s for result in requests)
    # The later curve is the thinner: a server that keeps up has them on top of each other.
    for times, label, colour, width in (
        (arrived, "arrived", "silver", 4.0),
        (completed, "completed", E2E_COLOUR, 1.5),
    ):
        counts = [0, *range(1, len(times) + 1), len(times)]
        axis.step([0, *times, end], counts, where="post", label=label, color=colour, lw=width)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(bottom=0)
    _label(axis, "Arrivals and completions", "time since the start (s)", "requests so far")


def _plot_tenants(axis: Axes, requests: Sequence[RequestResult], tenants: Sequence[str]) -> None:
    row = {tenant: number for number, tenant in enumerate(tenants)}
    for failed, label, colour in ((False, "completed", E2E_COLOUR), (True, "failed", FAILED_COLOUR)):
        chosen = [result for result in requests if (result.error is not None) == failed]
        if chosen:
            rows = [row[result.tenant] for result in chosen]
            arrivals = [result.arrival_s for result in chosen]
            axis.scatter(arrivals, rows, s=14, lw=0, color=colour, label=label)
            axis.hlines(
                rows, arrivals, [result.finished_s for result in chosen], color=colour, lw=2, alpha=0.5
            )
    counts = Counter(result.tenant for result in requests)
    axis.set_yticks(
        range(len(tenants)), [f"{tenant[:30]} ({counts[tenant]})" for tenant in tenants], fontsize=8
    )
    axis.set_ylim(len(tenants) - 0.5, -0.5)
    _label(axis, "Requests by tenant, arrival to end", "time since the start (s)", "tenant (requests)")


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left")
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    # Above the panel, where it hides no data.
    axis.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8, frameon=False, borderaxespad=0.2
    )


def _spans_decades(requests: Sequence[RequestResult]) -> bool:
    times = [time for result in requests for time in (result.ttft_s, result.e2e_s) if time]
    return bool(times) and max(times) > 20 * min(times)


def _plain_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _ttft(requests: Sequence[RequestResult]) -> list[float]:
    return [math.inf if result.ttft_s is None else result.ttft_s for result in requests]


def _e2e(requests: Sequence[RequestResult]) -> list[float]:
    return [math.inf if result.e2e_s is None else result.e2e_s for result in requests]


def _stats(requests: Sequence[RequestResult], window_s: float) -> Stats:
    completed = sum(result.error is None for result in requests)
    return Stats(
        requests=len(requests),
        completed=completed,
        failed=len(requests) - completed,
        throughput=completed / window_s,
        e2e_s=_latency(_e2e(requests)),
        ttft_s=_latency(_ttft(requests)),
    )


def _latency(values: Sequence[float]) -> Latency:
    finite = [value for value in values if math.isfinite(value)]
    p50, p90, p99 = (percentile(values, percent) if values else math.inf for percent in (50, 90, 99))
    return Latency(
        mean_completed=sum(finite) / len(finite) if finite else None,
        p50=p50 if math.isfinite(p50) else None,
        p90=p90 if math.isfinite(p90) else None,
        p99=p99 if math.isfinite(p99) else None,
    )


def _describe(settings: TraceSettings) -> str:
    tenants = "1 tenant" if len(settings.tenants) == 1 else f"{len(settings.tenants)} tenants"
    return (
        f"{settings.rate:g} requests/s over {settings.duration:g} s, {tenants} "
        f"({settings.popularity}), {settings.prompt_tokens} tokens in, {settings.output_tokens} out, "
        f"seed {settings.seed}"
    )

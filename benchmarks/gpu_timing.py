"""Time of GPU work as a server sees it: replayed from CUDA graphs, with caches that do not help."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

COPY_BYTES = 1 << 30
SAMPLE_SECONDS = 0.05  # of a measurement
REPEATS = (3, 50)  # least and most replays
SLOW_SECONDS = 0.25  # a call that takes longer is timed as it is: launches do not matter to it
CACHE_FACTOR = 4  # a graph goes through this many times the cache's size before it reads anything again
CACHE_BYTES = 64 << 20  # where the device does not say


def copies_for(bytes_read: int, device: torch.device) -> int:
    """Copies to go round, so that none is still in the cache when its turn comes again."""
    if device.type != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or CACHE_BYTES
    return -(-CACHE_FACTOR * cache // max(bytes_read, 1))


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median time of a call; ``calls`` do the same work on different copies of what they read.

    All of them are captured in one graph, which is replayed. The first call comes before, to compile.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        torch.cuda.synchronize()
        first = _timed(calls[0])
        if first > SLOW_SECONDS:
            return first
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        total = _timed(graph.replay)
        least, most = REPEATS
        repeats = min(max(int(SAMPLE_SECONDS / max(total, 1e-9)), least), most)
        times = [total, *(_timed(graph.replay) for _ in range(repeats - 1))]
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times) / len(calls)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a plain copy moves on the device, read and written together."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds([lambda: target.copy_(source)])


def _timed(function: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3

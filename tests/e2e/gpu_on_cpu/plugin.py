"""A vLLM plugin for tests: PrinMix takes what it runs on for a GPU, and CUDA graphs can be captured."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

OPS = ("linear_", "logits_", "embedding_", "norm_")


def register() -> None:
    import triton

    from tests.e2e.gpu_on_cpu import vllm_on_cpu

    assert triton.knobs.runtime.interpret, "start the process with TRITON_INTERPRET=1"
    _prinmix()
    _torch()
    _triton()
    vllm_on_cpu.install()


def _prinmix() -> None:
    """The Triton backend, and LoRA in the engine's configuration from the start."""
    from vllm_prinmix import hooks, manager
    from vllm_prinmix.triton_backend import TritonBackend

    def resolve(name: str) -> Any:
        return SimpleNamespace(is_cpu=lambda: False) if name == "current_platform" else found(name)

    found, hooks.resolve = hooks.resolve, resolve
    manager.backend_for = lambda device, slots, rows, dtype: TritonBackend(slots, rows, dtype, device)


def _torch() -> None:
    """`torch.cuda`'s graphs, which hold the launches within PrinMix's ops, not the ops themselves."""
    import torch
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    from tests import pretended_graphs
    from vllm_prinmix import ops
    from vllm_prinmix.compat import resolve

    inside = {getattr(torch.ops.prinmix, name).default: getattr(ops, name) for name in OPS}
    logger = resolve("init_logger")("vllm.prinmix")

    class Graph(pretended_graphs.PretendedGraph):
        def replay(self) -> None:
            ours = sum(module.startswith("vllm_prinmix") for module in self.kernels)
            logger.info("replay of a graph with %d launches of PrinMix", ours)
            super().replay()

    @contextmanager
    def graph(captured: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
        with pretended_graphs.capture(captured, inside):
            yield

    torch.cuda.CUDAGraph = Graph  # type: ignore[assignment, misc]
    torch.cuda.graph = graph  # type: ignore[assignment, misc]
    torch.cuda.is_current_stream_capturing = pretended_graphs.capturing
    load = CppPythonBindingsCodeCache.load_pybinding_async.__func__  # type: ignore[attr-defined]

    def load_recorded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        """What torch.compile makes is functions of C++ on a CPU, and launches like any other on a GPU."""
        result = load(cls, *args, **kwargs)
        return lambda: pretended_graphs.recorded(result())

    CppPythonBindingsCodeCache.load_pybinding_async = classmethod(load_recorded)  # type: ignore[assignment]


def _triton() -> None:
    """Log when a kernel of PrinMix's would be compiled: arguments of a kind that it was not launched with."""
    from triton.runtime.interpreter import GridExecutor

    from vllm_prinmix.compat import resolve

    launch, seen = GridExecutor.__call__, set()
    logger = resolve("init_logger")("vllm.prinmix")

    @functools.wraps(launch)
    def launch_and_log(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        kind = (self.fn.__name__, *map(_kind, args), *((name, kwargs[name]) for name in sorted(kwargs)))
        if self.fn.__module__.startswith("vllm_prinmix") and kind not in seen:
            seen.add(kind)
            logger.info("first launch of %s", kind)
        launch(self, *args, **kwargs)

    GridExecutor.__call__ = launch_and_log


def _kind(argument: Any) -> Any:
    """What Triton compiles anew for: dtypes, whether pointers and numbers are multiples of 16, and ones."""
    if hasattr(argument, "data_ptr"):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return "1" if argument == 1 else (argument % 16 == 0, abs(argument) >= 1 << 31)
    return type(argument)

"""A vLLM plugin for tests: PrinMix takes what it runs on for a GPU, and CUDA graphs can be captured.

It logs what the tests look at: each step's batch, each replayed graph, and launches (`launches`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

OPS = ("linear_", "logits_", "embedding_", "norm_")


def register() -> None:
    import triton

    from tests.e2e.gpu_on_cpu import launches, vllm_on_cpu

    assert triton.knobs.runtime.interpret, "start the process with TRITON_INTERPRET=1"
    _prinmix()
    _graphs()
    _inductor()
    launches.install()
    vllm_on_cpu.install()


def _prinmix() -> None:
    """The Triton backend, and LoRA in the engine's configuration from the start."""
    from vllm_prinmix import hooks, manager
    from vllm_prinmix.triton_backend import TritonBackend

    def resolve(name: str) -> Any:
        return SimpleNamespace(is_cpu=lambda: False) if name == "current_platform" else found(name)

    found, hooks.resolve = hooks.resolve, resolve
    manager.backend_for = lambda device, slots, rows, dtype: TritonBackend(slots, rows, dtype, device)


def _graphs() -> None:
    """`torch.cuda`'s graphs, which hold the launches within PrinMix's ops, not the ops themselves."""
    import torch
    from vllm.forward_context import get_forward_context

    from tests import pretended_graphs
    from vllm_prinmix import ops
    from vllm_prinmix.compat import resolve

    inside = {getattr(torch.ops.prinmix, name).default: getattr(ops, name) for name in OPS}
    logger = resolve("init_logger")("vllm.prinmix")

    class Graph(pretended_graphs.PretendedGraph):
        def replay(self) -> None:
            ours = sum(module.startswith("vllm_prinmix") for module in self.kernels)
            context = get_forward_context()
            kind, rows = context.cudagraph_runtime_mode.name, context.batch_descriptor.num_tokens
            logger.info("replay of a %s graph of %d rows with %d launches of PrinMix", kind, rows, ours)
            super().replay()

    @contextmanager
    def graph(captured: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
        with pretended_graphs.capture(captured, inside):
            yield

    torch.cuda.CUDAGraph = Graph  # type: ignore[assignment, misc]
    torch.cuda.graph = graph  # type: ignore[assignment, misc]
    torch.cuda.is_current_stream_capturing = pretended_graphs.capturing


def _inductor() -> None:
    """What torch.compile makes is functions of C++ on a CPU; on a GPU, launches like any other."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    from tests import pretended_graphs

    load = CppPythonBindingsCodeCache.load_pybinding_async.__func__  # type: ignore[attr-defined]

    def load_recorded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(cls, *args, **kwargs)
        return lambda: pretended_graphs.recorded(result())

    CppPythonBindingsCodeCache.load_pybinding_async = classmethod(load_recorded)  # type: ignore[assignment]

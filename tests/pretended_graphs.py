"""CUDA graphs that are not there, for tests of code that will be captured on a GPU.

A `PretendedGraph` records what is launched while it is captured: every operation of torch and every kernel,
with the very tensors and numbers that it was given. A replay launches them again. As on a GPU, what Python
decides while capturing stays decided, and tensors are read and written where they were; the usual ways of
waiting for the device and of going through memory of the CPU are errors, and what torch's operations newly
made is not there before the first replay (floating point: NaN).

Not as on a GPU: a capture runs what it records, memory is kept for as long as a graph lives, graphs of one
pool share none, and a copy from memory of the CPU cannot be told from one within the device. Importing this
patches Triton's interpreter: for processes whose kernels are interpreted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.allclose.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.unique_consecutive.default,
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
REFUSED = (
    *((torch, name) for name in ("as_tensor", "asarray", "from_numpy", "frombuffer", "tensor")),
    *((torch.Tensor, name) for name in ("cpu", "item", "new_tensor", "numpy", "pin_memory", "tolist")),
    (torch.cuda, "synchronize"),
    (torch.accelerator, "synchronize"),
)


class NotCapturable(RuntimeError):
    """What ends a capture on a GPU."""


class PretendedGraph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.launches: list[Callable[[], None]] = []
        self.kernels: list[str] = []  # modules of the kernels among them
        self.made: list[torch.Tensor] = []  # new ones

    def replay(self) -> None:
        if capturing():
            raise NotCapturable("a replay within a capture")
        for launch in self.launches:
            launch()


class _Recorder(TorchDispatchMode):
    """Runs operations and records them. ``inside``: custom op -> its function, recorded in its place."""

    def __init__(self, graph: PretendedGraph, inside: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.graph, self.inside = graph, inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = func in INDEXED and any(t.dtype == torch.bool for t in _tensors(args[1]))
        if func is aten.lift_fresh.default:
            raise NotCapturable("a tensor of Python's numbers, which the device would have to copy")
        if func in WAITS or by_mask:
            raise NotCapturable(f"{func} waits for the device")
        if func in self.inside:
            with self:
                return self.inside[func](*args, **kwargs)
        found = func(*args, **kwargs)
        given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        new = [tensor for tensor in _tensors(found) if _storage(tensor) not in given]
        self.graph.made += new
        self.graph.launches.append(functools.partial(_again, func, args, kwargs, found if new else ()))
        return found


def _again(func: Any, args: Any, kwargs: Any, place: Any) -> None:
    """``place``: the new tensors that the operation made when it was captured."""
    found = func(*args, **kwargs)
    if place != ():
        for old, new in zip(_tensors(place), _tensors(found), strict=True):
            if _storage(old) != _storage(new):
                old.copy_(new)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_recorder: _Recorder | None = None


def capturing() -> bool:
    """Stands in for `torch.cuda.is_current_stream_capturing`."""
    return _recorder is not None


@contextmanager
def capture(
    graph: PretendedGraph, inside: Mapping[Any, Callable[..., Any]] | None = None
) -> Iterator[PretendedGraph]:
    """Stands in for `torch.cuda.graph`. ``inside``: custom op -> its function, recorded in its place."""
    global _recorder
    if capturing():
        raise NotCapturable("a capture within a capture")
    with ExitStack() as stack:
        for owner, name in REFUSED:
            stack.enter_context(patch.object(owner, name, _refusing(owner, name)))
        _recorder = stack.enter_context(_Recorder(graph, inside or {}))
        try:
            yield graph
        finally:
            _recorder = None
    for tensor in graph.made:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))


def _refusing(owner: Any, name: str) -> Callable[..., Any]:
    function = getattr(owner, name)

    @functools.wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        if capturing():
            raise NotCapturable(
                f"{owner.__name__}.{name} waits for the device, or goes through the CPU's memory"
            )
        return function(*args, **kwargs)

    return refusing


def recorded(kernel: Callable[..., None]) -> Callable[..., None]:
    """``kernel``, which writes to tensors that it is given, as a graph's launch where one is captured."""

    @functools.wraps(kernel)
    def launch(*args: Any, **kwargs: Any) -> None:
        if _recorder is not None:
            _recorder.graph.launches.append(functools.partial(kernel, *args, **kwargs))
            function = getattr(args[0], "fn", kernel) if args else kernel
            _recorder.graph.kernels.append(function.__module__)
        with _disable_current_modes(), _not_recording():
            kernel(*args, **kwargs)

    return launch


@contextmanager
def _not_recording() -> Iterator[None]:
    """What a kernel does inside is no launch."""
    global _recorder
    before, _recorder = _recorder, None
    try:
        yield
    finally:
        _recorder = before


GridExecutor.__call__ = recorded(GridExecutor.__call__)

"""A device that is not there, for tests of code that will run on a GPU: memory apart from the CPU's.

Importing this makes the torch device ``pretended``. Its tensors hold tensors of the CPU, which do the work.
An operation that mixes them with the CPU's raises, as it would on a GPU, but for copies, for indices of a
tensor of the device, and for scalars (on a GPU only where an operation goes by elements). A random generator
of the CPU is not noticed either. For a process of its own: torch cannot forget a device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
CPU = torch.device("cpu")
aten = torch.ops.aten
CROSSES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Made on the CPU and copied: torch makes them in steps that a device in Python does not see.
FACTORIES = ("arange", "eye", "linspace", "randint", "tensor")


class MixedDevices(RuntimeError):
    """Tensors of both devices in one operation."""


class Pretended(torch.Tensor):
    """A tensor on the device; ``inner`` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            dispatch_sizes_strides_policy="sizes",  # some operations resize
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Pretended({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor of a device has to be copied to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, Pretended) else value


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, Pretended)]
    if function in INDEXED and isinstance(args[0], Pretended):
        tensors = [t for t in tree_leaves((args[0], args[2:])) if isinstance(t, torch.Tensor)]
    theirs = [tuple(t.shape) for t in tensors if not isinstance(t, Pretended) and t.dim()]
    if ours and theirs and function not in CROSSES:
        raise MixedDevices(f"{function}: {[tuple(t.shape) for t in ours]} with {theirs} of the CPU")
    given = kwargs.get("device")
    here = bool(ours) if given is None else torch.device(given).type == NAME
    if given is not None and here:
        kwargs = kwargs | {"device": CPU}
    inner_args, inner_kwargs = tree_map(_unwrap, (args, kwargs))
    result = function(*inner_args, **inner_kwargs)
    if function is aten.copy_.default:
        return args[0]
    if not here:
        return result
    known = {id(t.inner): t for t in ours}  # what an operation in place gives back

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Pretended):
            return value
        return known[id(value)] if id(value) in known else Pretended(value)

    return tree_map(wrap, result)


def _move(name: str) -> None:
    original = getattr(torch, name)

    def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            return original(*args, device=device, **kwargs)
        return original(*args, device=CPU, **kwargs).to(device)

    setattr(torch, name, made)


_library = torch.library.Library("_", "IMPL")  # kept: it takes its functions with it
_library.fallback(lambda function, *args, **kwargs: _run(function, args, kwargs), "PrivateUse1")
_device_constructors()  # `with torch.device(...)` is for these; it remembers them as they are now
for _name in FACTORIES:
    _move(_name)

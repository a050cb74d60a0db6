"""The compiled CPU kernels (cpu_kernels.cpp): built where they are first used, called through ctypes.

What torch offers works on dense weights or on layouts of its own, and unpacking with its operators costs
several times the product itself. The source has no dependency, so any C++ compiler builds it within seconds;
vLLM's CPU build needs one at run time too. Without a compiler the operators of `cpu` are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from vllm_prinmix.kernels import packing
from vllm_prinmix.kernels.packed import PackedFactors

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
HEADERS = ("cpu_factors.h", "cpu_lookup.h", "cpu_planes.h", "cpu_vectors.h")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class _BitClass(ctypes.Structure):
    _fields_ = (
        ("v", ctypes.c_void_p),
        ("u", ctypes.c_void_p),
        ("v_bits", ctypes.c_int32),
        ("u_bits", ctypes.c_int32),
        ("directions", ctypes.c_int32),
    )


class _Slice(ctypes.Structure):
    _fields_ = (
        ("classes", ctypes.POINTER(_BitClass)),
        ("scale", ctypes.c_void_p),
        ("v_zero", ctypes.c_void_p),
        ("u_zero", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("n_classes", ctypes.c_int32),
        ("u_blocks", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("row_offset", ctypes.c_int32),
        ("y_start", ctypes.c_int32),
    )


@cache
def library(*flags: str) -> ctypes.CDLL | None:
    """The compiled kernels; None, with a warning once, where they cannot be built or loaded.

    ``flags``: more of the compiler's, for tests.
    """
    try:
        built = ctypes.CDLL(str(_build(*flags)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"PrinMix: the CPU kernels cannot be compiled, slower ones are used: {detail.strip()[-500:]}",
            stacklevel=2,
        )
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    rows, activations = (pointer, pointer, number, pointer), (pointer, size, number)
    built.prinmix_prepare.argtypes = (pointer, number, number, number, pointer, number)
    built.prinmix_prepare.restype = pointer
    built.prinmix_free.argtypes = (pointer,)
    built.prinmix_linear.argtypes = (*rows, *activations, *activations)
    built.prinmix_expand.argtypes = (pointer, pointer, pointer, number, *activations)
    heads = (pointer, size, size, number)
    built.prinmix_norm.argtypes = (*rows, number, number, ctypes.c_float, *heads, *heads)
    for function in (built.prinmix_free, built.prinmix_linear, built.prinmix_expand, built.prinmix_norm):
        function.restype = None
    return built


def _build(*flags: str) -> Path:
    """The shared library for this source, compiler and processor; built once and kept in the user's cache."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler is found: install g++, or set CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [SOURCE.with_name(name).read_text() for name in (SOURCE.name, *HEADERS)]
    flags = (*FLAGS, *flags)
    key = repr((sources, flags, version, _processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-prinmix"
    target = folder / f"cpu_kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "built.so"
            command = [compiler, *flags, str(SOURCE), "-o", str(built)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            built.replace(target)  # at once: processes may build side by side
    return target


def _processor() -> str:
    """What -march=native depends on: a cache folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


class SiteFactors:
    """One tenant's packed factors at one site, prepared for the kernels; keeps their tensors alive.

    ``parts``: (factors, first column of y) of each slice of the layer's output; all read the same x, so they
    agree in their columns. In place of factors, a number of rows stands for a slice that only gets the bias.
    ``bias``: float32 [columns of y]. ``transposed`` is for embeddings, where V makes the output.
    """

    def __init__(
        self,
        parts: Sequence[tuple[PackedFactors | int, int]],
        bias: torch.Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        packed = [factors for factors, _ in parts if isinstance(factors, PackedFactors)]
        cols = packed[0].cols
        assert all(p.cols == cols for p in packed), "slices of one layer read the same inputs"
        bias = None if bias is None else bias.float().contiguous()
        self._alive = (packed, bias)
        arrays: list[object] = []
        slices = [_slice(factors, start, transposed, arrays) for factors, start in parts]
        self.address: int = _kernels().prinmix_prepare(
            (_Slice * len(slices))(*slices),
            len(slices),
            cols.length,
            cols.offset,
            None if bias is None else bias.data_ptr(),
            transposed,
        )
        weakref.finalize(self, _kernels().prinmix_free, self.address)


def _slice(factors: PackedFactors | int, y_start: int, transposed: bool, arrays: list[object]) -> _Slice:
    """``arrays`` keeps alive what the structure points to."""
    if not isinstance(factors, PackedFactors):
        return _Slice(rows=factors, u_blocks=packing.blocks(factors), y_start=y_start)
    classes = []
    for c in factors.classes:
        inputs, outputs = (c.v.data_ptr(), c.v_bits), (c.u.data_ptr(), c.u_bits)
        if transposed:
            inputs, outputs = outputs, inputs
        classes.append(_BitClass(inputs[0], outputs[0], inputs[1], outputs[1], c.directions))
    array = (_BitClass * len(classes))(*classes)
    arrays.append(array)
    v_zero, u_zero = factors.v_zero.data_ptr(), factors.u_zero.data_ptr()
    if transposed:
        v_zero, u_zero = u_zero, v_zero
    scaled = factors.row_scale is not None and not transposed
    outer = factors.cols if transposed else factors.rows
    return _Slice(
        classes=ctypes.cast(array, ctypes.POINTER(_BitClass)),
        scale=factors.scale.data_ptr(),
        v_zero=v_zero,
        u_zero=u_zero,
        row_scale=factors.row_scale.data_ptr() if scaled and factors.row_scale is not None else None,
        n_classes=len(classes),
        u_blocks=outer.blocks,
        rows=outer.length,
        row_offset=outer.offset,
        y_start=y_start,
    )


class Table:
    """A pointer for every slot of a batch, as the kernels take them; ``address`` stays the same."""

    def __init__(self, slots: int) -> None:
        self._pointers = (ctypes.c_void_p * slots)()
        self.address = ctypes.addressof(self._pointers)

    def __setitem__(self, slot: int, pointer: int | None) -> None:
        self._pointers[slot] = pointer


class Rows:
    """Which rows of a batch belong to which slot: ``groups`` are (slot, row numbers), none for base rows."""

    def __init__(self, groups: Sequence[tuple[int, np.ndarray]] = ()) -> None:
        self.groups = groups
        counts = [len(rows) for _, rows in groups]
        starts = itertools.accumulate(counts, initial=0)
        table = [(slot, start, len(rows)) for (slot, rows), start in zip(groups, starts, strict=False)]
        self._table = np.array(table, dtype=np.int32).reshape(-1, 3)
        self._order = np.concatenate([np.empty(0, np.int64), *(rows for _, rows in groups)]).astype(np.int64)
        self.arguments = (self._table.ctypes.data, len(groups), self._order.ctypes.data)

    @classmethod
    def of(cls, slots: np.ndarray) -> Rows:
        """``slots``: int64 [rows], negative for the base's."""
        present = np.unique(slots)
        return cls([(int(slot), np.flatnonzero(slots == slot)) for slot in present[present >= 0]])

    def window(self, start: int, length: int) -> Rows:
        """The same for a slice of the rows."""
        cut = [(slot, rows[(rows >= start) & (rows < start + length)] - start) for slot, rows in self.groups]
        return Rows([(slot, rows) for slot, rows in cut if len(rows)])


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def linear_(y: torch.Tensor, x: torch.Tensor, table: Table, rows: Rows) -> None:
    """y [rows, columns] += x [rows, cols] dW^T + bias, for the rows of slots with SiteFactors in ``table``.

    x and y are of any type in DTYPES, their rows any distance apart. What is stored is finite: NaN becomes 0,
    overflow the largest number.
    """
    x = _dense_rows(x)
    assert y.stride(1) == 1
    _kernels().prinmix_linear(
        table.address,
        *rows.arguments,
        x.data_ptr(),
        x.stride(0),
        DTYPES[x.dtype],
        y.data_ptr(),
        y.stride(0),
        DTYPES[y.dtype],
    )


def expand_(y: torch.Tensor, t: torch.Tensor, factors: SiteFactors, rows: torch.Tensor) -> None:
    """y[rows] += t float32 [rows, directions] times the directions; otherwise as `linear_`."""
    t, rows = t.contiguous(), rows.contiguous()
    assert y.stride(1) == 1
    _kernels().prinmix_expand(
        factors.address,
        t.data_ptr(),
        rows.data_ptr(),
        len(rows),
        y.data_ptr(),
        y.stride(0),
        DTYPES[y.dtype],
    )


def norm_(y: torch.Tensor, x: torch.Tensor, table: Table, rows: Rows, eps: float) -> None:
    """y [rows, ..., size] = RMSNorm(x) times the weight in ``table``, float32 [size], as `linear_`."""
    x, y = (_dense_rows(z).view(z.shape[0], -1, z.shape[-1]) for z in (x, y))
    _kernels().prinmix_norm(
        table.address,
        *rows.arguments,
        x.shape[1],
        x.shape[2],
        eps,
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        DTYPES[x.dtype],
        y.data_ptr(),
        y.stride(0),
        y.stride(1),
        DTYPES[y.dtype],
    )


def _dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


Groups = Sequence[tuple[SiteFactors, int]]  # each tenant with its number of tokens, rows one after another


def linear(x: torch.Tensor, groups: Groups, columns: int) -> torch.Tensor:
    """x [tokens, cols] -> x dW^T of every slice, float32 [tokens, columns]."""
    table, split, start = Table(len(groups)), [], 0
    for slot, (factors, count) in enumerate(groups):
        table[slot] = factors.address
        split.append((slot, np.arange(start, start + count)))
        start += count
    y = torch.zeros(x.shape[0], columns)
    linear_(y, x, table, Rows(split))
    return y


def _kernels() -> ctypes.CDLL:
    kernels = library()
    assert kernels is not None, "called only where the kernels are"
    return kernels

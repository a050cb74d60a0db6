"""The compiled CPU kernels (cpu_kernels.cpp): built where they are first used, called through ctypes.

What torch offers works on dense weights or on layouts of its own, and unpacking with its operators costs
several times the product itself. The source has no dependency, so any C++ compiler builds it within seconds;
vLLM's CPU build needs one at run time too. Without a compiler the operators of `cpu` are used.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from vllm_prinmix.kernels import packing
from vllm_prinmix.kernels.packed import PackedFactors

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class _BitClass(ctypes.Structure):
    _fields_ = (
        ("v", ctypes.c_void_p),
        ("u", ctypes.c_void_p),
        ("v_bits", ctypes.c_int32),
        ("u_bits", ctypes.c_int32),
        ("directions", ctypes.c_int32),
        ("start", ctypes.c_int32),
    )


class _Slice(ctypes.Structure):
    _fields_ = (
        ("classes", ctypes.POINTER(_BitClass)),
        ("scale", ctypes.c_void_p),
        ("v_zero", ctypes.c_void_p),
        ("u_zero", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("n_classes", ctypes.c_int32),
        ("directions", ctypes.c_int32),
        ("v_blocks", ctypes.c_int32),
        ("u_blocks", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("row_offset", ctypes.c_int32),
        ("y_start", ctypes.c_int32),
    )


class _Tenant(ctypes.Structure):
    _fields_ = (
        ("slices", ctypes.POINTER(_Slice)),
        ("n_slices", ctypes.c_int32),
        ("first", ctypes.c_int32),
        ("tokens", ctypes.c_int32),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with a warning once, where they cannot be built or loaded."""
    try:
        built = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"PrinMix: the CPU kernels cannot be compiled, slower ones are used: {detail.strip()[-500:]}",
            stacklevel=2,
        )
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    built.prinmix_shrink.argtypes = (pointer, number, pointer, size, pointer, pointer, size)
    built.prinmix_expand.argtypes = (pointer, number, pointer, size, pointer, size)
    built.prinmix_shrink.restype = built.prinmix_expand.restype = None
    return built


def _build() -> Path:
    """The shared library for this source, compiler and processor; built once and kept in the user's cache."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler is found: install g++, or set CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    key = repr((SOURCE.read_text(), FLAGS, version, _processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-prinmix"
    target = folder / f"cpu_kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "built.so"
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(built)]
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
    """One tenant's packed factors at one site, described for the kernels; keeps their tensors alive.

    ``parts``: (factors, first column of y) of each slice of the layer's output; all read the same x, so they
    agree in their columns. ``transposed`` is for embeddings, where V makes the output.
    """

    def __init__(self, parts: Sequence[tuple[PackedFactors, int]], transposed: bool = False) -> None:
        self.cols = parts[0][0].cols
        self.directions = 0
        self._alive: list[object] = []
        slices = []
        for factors, y_start in parts:
            assert factors.cols == self.cols, "slices of one layer read the same inputs"
            slices.append(self._slice(factors, y_start, transposed))
            self.directions += factors.scale.numel()
        self.slices = (_Slice * len(slices))(*slices)

    def _slice(self, factors: PackedFactors, y_start: int, transposed: bool) -> _Slice:
        classes, start = [], 0
        for c in factors.classes:
            inputs, outputs = (c.v.data_ptr(), c.v_bits), (c.u.data_ptr(), c.u_bits)
            if transposed:
                inputs, outputs = outputs, inputs
            classes.append(_BitClass(inputs[0], outputs[0], inputs[1], outputs[1], c.directions, start))
            start += c.directions
        array = (_BitClass * len(classes))(*classes)
        zeros = [factors.v_zero.float(), factors.u_zero.float()]
        tables = [factors.scale, *(reversed(zeros) if transposed else zeros)]
        if factors.row_scale is not None and not transposed:
            tables.append(factors.row_scale.float())
        tables = [table.contiguous() for table in tables]
        self._alive += [factors, array, tables]
        pointers = [table.data_ptr() for table in tables]
        inner, outer = (factors.rows, factors.cols) if transposed else (factors.cols, factors.rows)
        return _Slice(
            classes=ctypes.cast(array, ctypes.POINTER(_BitClass)),
            scale=pointers[0],
            v_zero=pointers[1],
            u_zero=pointers[2],
            row_scale=pointers[3] if len(pointers) > 3 else None,
            n_classes=len(classes),
            directions=start,
            v_blocks=inner.blocks,
            u_blocks=outer.blocks,
            rows=outer.length,
            row_offset=outer.offset,
            y_start=y_start,
        )


Groups = Sequence[tuple[SiteFactors, int]]  # each tenant with its number of tokens, rows one after another


def linear(x: torch.Tensor, groups: Groups, columns: int) -> torch.Tensor:
    """x [tokens, cols] (any float dtype) -> x dW^T of every slice, float32 [tokens, columns]."""
    tokens, extent = x.shape[0], groups[0][0].cols
    width = extent.blocks * packing.BLOCK
    if width == extent.length and x.dtype == torch.float32 and x.is_contiguous():
        inputs = x
    else:
        inputs = torch.zeros(tokens, width)
        inputs[:, extent.offset : extent.offset + extent.length] = x
    sums = inputs.sum(1)
    stride = max(factors.directions for factors, _ in groups)
    # Zeros: what lies behind a tenant's last direction is multiplied by a code of zero, and may not be NaN.
    t = torch.zeros(tokens * stride + packing.TILE)
    tenants = _tenants(groups)
    _kernels().prinmix_shrink(
        tenants, len(groups), inputs.data_ptr(), width, sums.data_ptr(), t.data_ptr(), stride
    )
    y = torch.zeros(tokens, columns)
    _kernels().prinmix_expand(tenants, len(groups), t.data_ptr(), stride, y.data_ptr(), columns)
    return y


def expand(t: torch.Tensor, factors: SiteFactors, columns: int) -> torch.Tensor:
    """t float32 [tokens, directions] -> its product with the directions, float32 [tokens, columns]."""
    padded = torch.zeros(t.numel() + packing.TILE)
    padded[: t.numel()] = t.reshape(-1)
    y = torch.zeros(t.shape[0], columns)
    tenants = _tenants([(factors, t.shape[0])])
    _kernels().prinmix_expand(tenants, 1, padded.data_ptr(), t.shape[1], y.data_ptr(), columns)
    return y


def _kernels() -> ctypes.CDLL:
    kernels = library()
    assert kernels is not None, "SiteFactors are made only where the kernels are"
    return kernels


def _tenants(groups: Groups) -> ctypes.Array[_Tenant]:
    tenants, first = (_Tenant * len(groups))(), 0
    for tenant, (factors, count) in zip(tenants, groups, strict=True):
        tenant.slices, tenant.n_slices = factors.slices, len(factors.slices)
        tenant.first, tenant.tokens = first, count
        first += count
    return tenants

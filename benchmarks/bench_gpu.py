"""Measures the cases of `benchmarks.kernels` on a GPU, within the memory and the time there is."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from benchmarks import gpu_timing
from benchmarks.contenders_gpu import CONTENDERS, Base, Batch, Contender, Ours
from benchmarks.layer import Case
from vllm_prinmix.errors import PrinMixError

MEMORY_SHARE = 0.85  # of what is free, for a contender: it also needs room for what it computes
COMPARED_ROWS = 256


class DeviceLost(PrinMixError):
    """An error after which nothing works on the device any more."""


class LeftOut(Exception):
    """Why a contender is not measured."""


class Bench:
    """``seconds``: time for all cases; whatever has not begun by then is left out."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.deadline = time.monotonic() + seconds
        self.copy_bytes_per_second = gpu_timing.copy_bandwidth(device)

    @torch.inference_mode()
    def measure(self, case: Case) -> dict[str, Any]:
        """``packed_bytes`` and ``seconds`` of every contender for one layer.

        Also ``failed`` (contender -> reason), ``notes`` (contender -> what to know) and ``errors``
        (contender -> difference of its outputs from those with a dense dW, relative to these, where both are
        there). ``seconds`` also has the base layer's own products (``base``) and both together.
        """
        line: dict[str, Any] = {"seconds": {}, "failed": {}, "notes": {}, "errors": {}}
        outputs: dict[str, list[torch.Tensor]] = {}
        batch = None
        for kind in CONTENDERS:
            try:
                if time.monotonic() > self.deadline:
                    raise LeftOut(f"the {self.seconds:g} s for all cases were over")
                if batch is None:
                    batch = Batch(case, self.device)
                    line["packed_bytes"] = batch.packed_bytes
                outputs[kind.name] = self._contender(kind, batch, line)
            except LeftOut as reason:
                line["failed"][kind.name] = str(reason)
            except Exception as error:  # whatever it is, the others can still be measured
                line["failed"][kind.name] = _reason(error)
                self._still_there(error)
            torch.cuda.empty_cache()
        expected = outputs.pop("dense", None)
        if expected is not None:
            line["errors"] = {name: difference(found, expected) for name, found in outputs.items()}
        return line

    def _contender(self, kind: type[Contender], batch: Batch, line: dict[str, Any]) -> list[torch.Tensor]:
        """Measure it into ``line``; float32 rows of what it adds."""
        contender, copies = self._made(kind, batch)
        for y in batch.outputs:
            y.zero_()
        contender.add(0)
        step = -(-batch.case.rows // COMPARED_ROWS)
        added = [y[::step].float() for y in batch.outputs]
        line["seconds"][kind.name] = gpu_timing.seconds([partial(contender.add, i) for i in range(copies)])
        note = contender.note()
        if note:
            line["notes"][kind.name] = note
        if isinstance(contender, Ours):
            base, bases = self._made(Base, batch)
            line["seconds"]["base"] = gpu_timing.seconds([partial(base.add, i) for i in range(bases)])

            def both(i: int) -> None:
                base.add(i % bases)
                contender.add(i % copies)

            calls = [partial(both, i) for i in range(max(copies, bases))]
            line["seconds"]["base_and_ours"] = gpu_timing.seconds(calls)
        return added

    def _made(self, kind: type[Contender], batch: Batch) -> tuple[Contender, int]:
        nbytes = kind.nbytes(batch)
        copies = gpu_timing.copies_for(nbytes, self.device)
        free, need = torch.cuda.mem_get_info(self.device)[0] * MEMORY_SHARE, copies * nbytes
        if need > free:
            raise LeftOut(f"needs {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB may be used")
        return kind(batch, copies), copies

    def _still_there(self, cause: Exception) -> None:
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            raise DeviceLost(
                "the device does not work any more after this error", found=_reason(cause)
            ) from cause


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return (difference / sum(float(b.square().sum()) for b in expected)) ** 0.5

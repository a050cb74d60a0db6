"""One matrix's compression as a task: all it needs in, all that is kept out; here or in another process."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from vllm_prinmix.compress.allocation.budgets import Curve
from vllm_prinmix.compress.measure import activation_energy, weight_error
from vllm_prinmix.compress.methods.base import Method
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.threads import one_thread_if_small
from vllm_prinmix.format.payload import decode, encode
from vllm_prinmix.format.schema import Module
from vllm_prinmix.kernels.quantized import QuantizedFactors


@dataclass(frozen=True)
class Task:
    """How one matrix is compressed; the matrix itself and the metric of its inputs go beside it."""

    name: str
    method: Method
    limit: int | None  # bytes, see Job.limit
    transposed: bool  # the method is given dW^T


@dataclass(frozen=True)
class Survey:
    """What can be expected of one matrix with more or fewer bytes."""

    name: str
    curve: Curve
    energy: float  # ||dW X||^2


@dataclass(frozen=True)
class Result:
    """What the delta keeps of one matrix, and what was warned of on the way."""

    name: str
    spec: Module
    payload: torch.Tensor  # uint8, on the CPU
    warnings: list[str]


# Bytes of a matrix, as parts of what its own ratio gives it, that a shared budget may choose between.
PARTS = (0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0)


def survey(task: Task, dw: torch.Tensor, hessian: Hessian, correction: torch.Tensor | None = None) -> Survey:
    """The errors to be expected with PARTS of ``task.limit``; arguments as those of `solve`."""
    if correction is not None:
        dw = dw + correction
    assert task.limit is not None
    least = min(task.method.least_bytes(*dw.shape), task.limit)
    budgets = sorted({max(least, int(part * task.limit)) for part in PARTS})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `solve` says the same
        with one_thread_if_small(max(dw.shape)):
            curve = task.method.curve(dw, hessian, budgets)
            return Survey(task.name, curve, activation_energy(dw, hessian))


def solve(task: Task, dw: torch.Tensor, hessian: Hessian, correction: torch.Tensor | None = None) -> Result:
    """Compress dW, float32 [rows, cols] and not all zero, and measure the errors of what is stored.

    ``hessian`` is the metric of its inputs; of dW^T's where ``task.transposed``. ``correction``
    (`compensation.Fit`) is added to what is compressed; "error" is of both, "weight_error" of dW.
    """
    target = dw if correction is None else dw + correction
    with warnings.catch_warnings(record=True) as caught, one_thread_if_small(max(dw.shape)):
        warnings.simplefilter("always")
        matrix = target.T.contiguous() if task.transposed else target
        change, report = task.method.compress(matrix, hessian, task.limit)
    if task.transposed:
        assert isinstance(change, QuantizedFactors), "see Method.for_embedding"
        change = change.transpose()
    spec, payload = encode(change, report)
    if task.limit is not None and payload.numel() > task.limit:
        raise RuntimeError(f"{task.name}: {payload.numel()} bytes where {task.limit} were allowed")
    report = report | {"weight_error": weight_error(dw.cpu(), decode(spec, payload).dense())}
    spec = spec.model_copy(update={"report": report})
    return Result(task.name, spec, payload, [str(warning.message) for warning in caught])

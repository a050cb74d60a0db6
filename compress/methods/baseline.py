"""What the baselines have in common: they are compared on the linear layers alone."""

from __future__ import annotations

from abc import abstractmethod

import torch

from vllm_prinmix.compress.measure import activation_error
from vllm_prinmix.compress.methods.base import Method, Quantized, Report
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.quantization.grid import Grid
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.kernels.packing import matrix_bytes
from vllm_prinmix.kernels.quantized import QuantizedMatrix


class Baseline(Method):
    """A method to compare with.

    Embeddings and lm_head are compressed by `prinmix` whatever the baseline: most published methods leave
    them dense, and a comparison of the linear layers wants the rest to be equal.
    """

    def for_embedding(self) -> Method:
        return PrinMix()


class MatrixBaseline(Baseline):
    """A baseline without SVD, one width for the whole matrix: its size follows from the width."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Bits of a code, where the options alone decide it."""

    @property
    def has_own_size(self) -> bool:
        return True

    def least_bytes(self, rows: int, cols: int) -> int:
        return matrix_bytes(self.width, rows, cols)


def check_width(bits: tuple[int, ...], allowed: tuple[int, ...]) -> None:
    """Raises PrinMixError unless ``bits`` (--bits) is exactly one of the ``allowed`` widths."""
    if len(bits) != 1 or bits[0] not in allowed:
        raise PrinMixError(
            "the method has one bit-width",
            where="--bits",
            found=",".join(map(str, bits)),
            expected="one of " + ", ".join(map(str, allowed)),
        )


def as_matrix(codes: torch.Tensor, grid: Grid) -> QuantizedMatrix:
    """uint8 codes [rows, cols] with a grid of one entry per row, all of one width."""
    return QuantizedMatrix(codes, int(grid.bits[0]), grid.scale, grid.zero)


def report_error(dw: torch.Tensor, quantized: Quantized, hessian: Hessian) -> Report:
    """The part of a report that every method has."""
    return {"error": activation_error(dw, quantized.dense(), hessian)}

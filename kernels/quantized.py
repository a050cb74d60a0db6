"""A module's delta in quantized form: integer codes with their scales and zero points, not yet packed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

MAX_BITS = 8
ROWS = 8192  # dequantized at once, so that an lm_head takes no memory beside its dense form


@dataclass
class QuantizedFactors:
    """dW[rows, cols] ~= diag(row_scale) . sum_i scale_i (u_i - u_zero_i) (v_i - v_zero_i)^T.

    One entry of each vector per *direction* i (a singular direction: row of V, column of U). The
    singular value is folded into ``scale``, and so are the grids' scales of V and U: at run time
    only their product is ever used. Directions with zero bits are not held at all.
    """

    v_codes: torch.Tensor  # uint8 [directions, cols], each below 2**v_bits
    u_codes: torch.Tensor  # uint8 [directions, rows], each below 2**u_bits
    v_bits: torch.Tensor  # uint8 [directions], 1 to 8
    u_bits: torch.Tensor  # uint8 [directions], 1 to 8
    scale: torch.Tensor  # float32 [directions]
    v_zero: torch.Tensor  # float16 [directions], may be fractional
    u_zero: torch.Tensor  # float16 [directions]
    row_scale: torch.Tensor | None = field(default=None)  # float16 [rows]

    @classmethod
    def empty(cls, rows: int, cols: int, device: torch.device | str = "cpu") -> QuantizedFactors:
        """The factors of a zero matrix [rows, cols]: no directions."""
        byte = torch.empty(0, dtype=torch.uint8, device=device)
        half = torch.empty(0, dtype=torch.float16, device=device)
        return cls(
            byte.new_empty(0, cols),
            byte.new_empty(0, rows),
            byte,
            byte.clone(),
            half.float(),
            half,
            half.clone(),
        )

    @property
    def directions(self) -> int:
        return self.scale.numel()

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of dW."""
        return self.u_codes.shape[1], self.v_codes.shape[1]

    def v(self) -> torch.Tensor:
        """float32 [directions, cols]: codes less zero points; the scale is not applied."""
        return self.v_codes.float() - self.v_zero.float()[:, None]

    def u(self) -> torch.Tensor:
        """float32 [directions, rows]: codes less zero points; the scale is not applied."""
        return self.u_codes.float() - self.u_zero.float()[:, None]

    def transpose(self) -> QuantizedFactors:
        """The factors of dW^T: U and V swapped.

        Raises ValueError for factors with a row scale, which has no counterpart for columns.
        """
        if self.row_scale is not None:
            raise ValueError("factors with a row scale cannot be transposed")
        return QuantizedFactors(
            v_codes=self.u_codes,
            u_codes=self.v_codes,
            v_bits=self.u_bits,
            u_bits=self.v_bits,
            scale=self.scale,
            v_zero=self.u_zero,
            u_zero=self.v_zero,
        )

    def dense(self) -> torch.Tensor:
        """float32 [rows, cols]: the dequantized dW."""
        rows, cols = self.shape
        weight = torch.empty(rows, cols, device=self.scale.device)
        scaled_v = self.v() * self.scale[:, None]
        for start in range(0, rows, ROWS):
            u = self.u_codes[:, start : start + ROWS].float() - self.u_zero.float()[:, None]
            torch.mm(u.T, scaled_v, out=weight[start : start + ROWS])
        return weight if self.row_scale is None else weight.mul_(self.row_scale.float()[:, None])


@dataclass
class QuantizedMatrix:
    """dW[rows, cols] ~= scale[rows] * (codes - zero[rows]): a module without SVD, one width for all rows."""

    codes: torch.Tensor  # uint8 [rows, cols], each below 2**bits
    bits: int  # 1 to 8
    scale: torch.Tensor  # float32 [rows]
    zero: torch.Tensor  # float16 [rows]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self) -> torch.Tensor:
        """float32 [rows, cols]."""
        return (self.codes.float() - self.zero.float()[:, None]) * self.scale[:, None]

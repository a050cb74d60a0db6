"""What tables compare with and the delta format does not hold: the models themselves, and U by rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from vllm_prinmix.compress.allocation.allocate import allocate
from vllm_prinmix.compress.measure import activation_error
from vllm_prinmix.compress.methods.paper import Paper, direction_bytes, simulate
from vllm_prinmix.compress.quantization.gptq import gptq
from vllm_prinmix.compress.quantization.grid import dequantize, minmax_grid
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.quantization.rtc import correct_target
from vllm_prinmix.compress.quantization.svd import thin_svd
from vllm_prinmix.kernels.packing import row_bytes

GRID_BYTES = 6  # of a vector: float32 scale and float16 zero point


@dataclass(frozen=True)
class Dense:
    """A change as it is, float32 [rows, cols], and the bytes it would take.

    ``kept``: whether it has to be kept until it is evaluated, not being a model's own.
    """

    weight: torch.Tensor
    bytes: int
    kept: bool = True

    def dense(self) -> torch.Tensor:
        return self.weight


@dataclass(frozen=True)
class Reference:
    """``fine-tuned``: the whole change in 2 bytes per weight; ``base``: nothing of it."""

    name: str
    has_own_size: ClassVar[bool] = True
    repeats: ClassVar[int] = 0

    @property
    def takes_exact(self) -> bool:
        """Whether the tensors that are never quantized, such as norms, are the fine-tune's."""
        return self.name == "fine-tuned"

    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int | None
    ) -> tuple[Dense, dict[str, Any]]:
        if self.takes_exact:
            return Dense(dw, 2 * dw.numel(), kept=False), {"error": 0.0}
        return Dense(torch.zeros_like(dw), 0, kept=False), {"error": 1.0}

    def least_bytes(self, rows: int, cols: int) -> int:
        return 2 * rows * cols if self.takes_exact else 0

    def for_embedding(self) -> Reference:
        return self

    def options(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class RowWise:
    """The paper's method with U quantized by rows: each output's row has a width and a grid of its own.

    "PRINMIX-row" of Table 8. V is as in the paper's method; U's bytes, what V leaves of the budget, are
    given to U's rows by the same program with the errors of U (Eq. 6).
    """

    name: ClassVar[str] = "prinmix-paper, U by rows"
    has_own_size: ClassVar[bool] = False
    repeats: ClassVar[int] = 0
    paper: Paper = field(default_factory=lambda: Paper(solver="exact"))

    def compress(
        self, dw: torch.Tensor, hessian: Hessian, budget_bytes: int | None
    ) -> tuple[Dense, dict[str, Any]]:
        assert budget_bytes is not None
        rows, cols = dw.shape
        bits, limit, solver = self.paper.bits, self.paper.max_active_bits, self.paper.solver
        u, sigma, v = thin_svd(dw)
        cost = [direction_bytes(b, rows, cols) for b in bits]
        errors = simulate(v, sigma, hessian, bits).numpy()
        chosen = torch.from_numpy(allocate(errors, cost, budget_bytes, limit, solver).choice)
        widths = torch.tensor(bits, device=dw.device)[chosen.to(dw.device)]
        kept = widths > 0
        u, sigma, v, widths = u[:, kept], sigma[kept], v[kept], widths[kept].to(torch.uint8)
        v_grid = minmax_grid(v, widths)
        sv = sigma[:, None] * dequantize(gptq(v, hessian, v_grid), v_grid)
        spent = sum(row_bytes(int(b), cols) for b in widths) + GRID_BYTES * len(widths)
        target, metric = correct_target(dw, u, sv, hessian)
        u_hessian = Hessian(metric)
        simulated = simulate(target, torch.ones(rows, device=dw.device), u_hessian, bits).numpy()
        row_cost = [-(-b * len(widths) // 8) + GRID_BYTES if b else 0 for b in bits]
        choice = allocate(simulated, row_cost, budget_bytes - spent, limit, solver).choice
        u_widths = torch.tensor(bits, dtype=torch.uint8)[torch.from_numpy(choice)].to(dw.device)
        some = u_widths > 0
        quantized = torch.zeros_like(target)
        grid = minmax_grid(target[some], u_widths[some])
        quantized[some] = dequantize(gptq(target[some], u_hessian, grid), grid)
        weight = quantized @ sv
        size = spent + sum(row_cost[i] for i in choice.tolist())
        return Dense(weight, size), {"error": activation_error(dw, weight, hessian)}

    def least_bytes(self, rows: int, cols: int) -> int:
        return self.paper.least_bytes(rows, cols)

    def for_embedding(self) -> Paper:
        return self.paper

    def options(self) -> dict[str, Any]:
        return self.paper.options()

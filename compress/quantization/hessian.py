"""The metric of a module's inputs, H = X X^T: errors are measured and minimised in it (Eq. 1-2)."""

from __future__ import annotations

import warnings
from functools import cached_property

import torch

from vllm_prinmix.compress.quantization.threads import one_thread_if_small
from vllm_prinmix.errors import PrinMixError

# What GPTQ adds to H's diagonal, as a fraction of the mean diagonal, so that it can be factorised.
DAMPING = 0.01
# Where that is not enough, this many times ten times more is tried.
DAMPING_STEPS = 3


class Hessian:
    """H = sum over calibration tokens of x x^T, dense float32 [K, K] or its diagonal float32 [K].

    The diagonal form is for inputs that are one-hot (embeddings: H_kk counts token k); K may then be as
    large as a vocabulary, and nothing of size K x K is ever made. The paper's factor 2 (Eq. 2) cancels
    everywhere and is left out. Where calibration never reached the module (H = 0), all inputs weigh the
    same, and a warning says so.

    Raises PrinMixError where ``matrix`` has another shape, NaN or infinite entries, or a negative diagonal.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        if matrix.dim() > 2 or (matrix.dim() == 2 and matrix.shape[0] != matrix.shape[1]):
            raise PrinMixError(
                "the metric H of the calibration inputs has the wrong shape",
                found=tuple(matrix.shape),
                expected="[K, K], or [K] for a diagonal",
            )
        matrix = matrix.float()
        require_finite(matrix, "the metric H of the calibration inputs")
        diagonal = matrix.diagonal() if matrix.dim() == 2 else matrix
        if bool((diagonal < 0).any()):
            raise PrinMixError(
                "the metric H of the calibration inputs has a negative diagonal",
                found=f"{float(diagonal.min()):g}",
                expected="sums of squares",
            )
        if not bool(diagonal.any()):
            warnings.warn("calibration never reached this module: its inputs weigh alike", stacklevel=2)
            matrix = torch.ones_like(diagonal)
        self.matrix = matrix
        self.repeated: tuple[Hessian, ...] = ()  # the layer run again on its outputs: `metrics.hessians`

    @property
    def size(self) -> int:
        """K, the number of inputs."""
        return self.matrix.shape[0]

    @property
    def is_diagonal(self) -> bool:
        return self.matrix.dim() == 1

    def times(self, rows: torch.Tensor) -> torch.Tensor:
        """rows H: float32 [n, K] -> float32 [n, K]."""
        return rows * self.matrix if self.is_diagonal else rows @ self.matrix

    def norm(self, rows: torch.Tensor) -> torch.Tensor:
        """w_i H w_i^T = ||w_i X||^2 of each row: float32 [n, K] -> float64 [n], at least 0 (Eq. 1)."""
        return self.times(rows).mul_(rows).sum(dim=1, dtype=torch.float64).clamp_(min=0)

    @property
    def damping(self) -> torch.Tensor:
        """What GPTQ adds to the diagonal (float32 scalar)."""
        diagonal = self.matrix if self.is_diagonal else self.matrix.diagonal()
        return DAMPING * diagonal.mean()

    def damped_norm(self, rows: torch.Tensor) -> torch.Tensor:
        """w_i (H + damping) w_i^T of each row: float32 [n, K] -> float64 [n]; a diagonal H is not damped."""
        if self.is_diagonal:
            return self.norm(rows)
        return self.norm(rows) + float(self.damping) * rows.square().sum(dim=1, dtype=torch.float64)

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """rows (H + damping)^-1: float32 [n, K] -> float32 [n, K]; a diagonal H is not damped."""
        if self.is_diagonal:
            return rows / self.matrix
        order, factor, pivots = self.feedback
        triangular = torch.linalg.solve_triangular
        half = triangular(factor.T, rows[:, order], upper=True, left=False, unitriangular=True)
        half /= pivots
        solved = torch.empty_like(rows)
        solved[:, order] = triangular(factor, half, upper=False, left=False, unitriangular=True)
        return solved

    @cached_property
    def feedback(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(order int64 [K], factor float32 [K, K], pivots float32 [K]) of the damped dense H, for `gptq`.

        ``order`` sorts the inputs by their diagonal, smallest first. ``factor`` is lower triangular with
        unit diagonal: with H reordered, H + damping = F D F^T, D = diag(``pivots``).
        """
        diagonal = self.matrix.diagonal()
        order = torch.argsort(diagonal, stable=True)
        # Bit for bit the same wherever it is computed first, whatever is compressed with it.
        with one_thread_if_small(self.size):
            lower = damped_cholesky(self.matrix[order][:, order], self.damping)
        roots = lower.diagonal().clone()
        return order, lower.div_(roots), roots**2


def damped_cholesky(matrix: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """Lower L with L L^T = matrix + diag(damping), more damping (and a warning) where that fails.

    ``matrix`` is symmetric [K, K] and is changed in place; ``damping`` is a scalar or [K], above 0.
    Raises PrinMixError where 10**DAMPING_STEPS times the damping is not enough.
    """
    added: float | torch.Tensor = 0.0
    for step in range(DAMPING_STEPS + 1):
        matrix.diagonal().add_(damping * 10**step - added)
        added = damping * 10**step
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            if step:
                warnings.warn(
                    f"H is nearly singular: its damping was increased {10**step} times; "
                    "more calibration samples help",
                    stacklevel=2,
                )
            return lower
    raise PrinMixError(
        "the metric H of the calibration inputs is not positive semi-definite",
        found=f"no Cholesky factor even with {10**DAMPING_STEPS} times the usual damping",
        fix="check that the calibration activations are sane, or use more calibration samples",
    )


def require_finite(tensor: torch.Tensor, what: str) -> None:
    """Raises PrinMixError where ``tensor`` holds NaN or infinity; ``what`` names it in the message."""
    # One pass without a mask as large as the tensor: any NaN or infinity survives in the extremes.
    if tensor.numel() and not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        raise PrinMixError(f"{what} has NaN or infinite entries", expected="finite numbers")

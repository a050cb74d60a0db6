"""Muon: momentum whose update is orthogonalised, for the weight matrices of the demo's models.

It needs about half of AdamW's steps here. torch.optim.Muon is fixed to bfloat16, which a CPU without such
instructions emulates slowly, and goes matrix by matrix; here the dtype is free and equal shapes go together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

# K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024): quintic polynomial.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Push all singular values of each matrix towards 1 (Newton-Schulz; they end between about 0.7 and 1.2).

    ``matrices`` is [n, rows, columns] of any float dtype, rows <= columns; so is the result.
    """
    a, b, c = COEFFICIENTS
    x = matrices / (matrices.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(matrices.dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """For 2-D parameters. The update has AdamW's usual root mean square, so one learning rate fits both.

    Nesterov momentum, no weight decay; ``compute_dtype`` is that of the Newton-Schulz iteration.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.compute_dtype = compute_dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                alike[tuple(parameter.shape)].append(parameter)
            for shape, parameters in alike.items():
                tall = shape[0] > shape[1]
                updates = torch.stack([self._momentum(p, group["momentum"]) for p in parameters])
                updates = updates.mT if tall else updates
                updates = orthogonalise(updates.to(self.compute_dtype)).to(updates.dtype)
                updates = updates.mT if tall else updates
                # A matrix with all singular values 1 has a root mean square of max(shape) ** -0.5.
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.sub_(update, alpha=size)

    def _momentum(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        if parameter.grad is None:
            raise RuntimeError("a parameter has no gradient")
        state = self.state[parameter]
        average = state.setdefault("average", torch.zeros_like(parameter))
        average.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)

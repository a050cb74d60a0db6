"""Bit allocation (Eq. 8): each direction's width under a byte budget, with few widths active."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_prinmix.compress.allocation import active
from vllm_prinmix.compress.allocation.knapsack import total
from vllm_prinmix.errors import PrinMixError

SOLVERS = ("scip", "exact")

# Bounds this close, relatively, are equal: the accuracy that SCIP computes with.
TOLERANCE = 1e-9

# No limits: the optimum is proved, and the same table gives the same choice on every machine.
SCIP_PARAMETERS = {
    "limits/gap": 0.0,
    "limits/absgap": 0.0,
    "randomization/randomseedshift": 0,
    "randomization/permutationseed": 0,
    "randomization/permutevars": False,
    "randomization/permuteconss": False,
    "parallel/maxnthreads": 1,
    "lp/threads": 1,
    # The budget counts up to millions of units; a violation has to stay well below one.
    "numerics/feastol": 1e-9,
}


@dataclass(frozen=True)
class Allocation:
    """What a solver of Eq. 8 chose, and how far from the best it can be at most."""

    choice: np.ndarray  # int64 [n]: index into the candidates
    error: float  # sum of the chosen errors
    objective: float  # what was minimised: the error, and with a rank penalty what that adds
    bound: float  # of the objective, proved: no choice has less

    @property
    def gap(self) -> float:
        """(objective - bound) / objective; 0 where the optimum is proved."""
        gap = 1 - self.bound / self.objective if self.objective > 0 else 0.0
        return gap if gap > TOLERANCE else 0.0


def allocate(
    errors: np.ndarray,
    cost_bytes: Sequence[int],
    budget_bytes: int,
    max_active: int,
    solver: str = "scip",
    *,
    free: int | None = None,
    rank_penalty: float = 0.0,
) -> Allocation:
    """Eq. 8: the candidate of each row that minimises the sum of ``errors``.

    ``errors`` float64 [n, B]: error of row i with candidate b (Eq. 5), finite and at least 0.
    ``cost_bytes`` [B]: bytes of a row with candidate b, the same for all rows. At most ``budget_bytes`` are
    spent and at most ``max_active`` candidates are used (f_max; 0 bits counts as one, unless it is ``free``).

    ``rank_penalty`` prefers fewer rows that cost bytes. Its unit is the mean error per such row (all errors
    over their number) without a penalty: that many of them is what each row has to be worth. Where a share x
    of the rows is saved, the error has risen by at most rank_penalty * x of itself.

    ``solver`` is "scip" (CVXPY and SCIP, the paper's) or "exact" (`active`, the same optimum many times
    faster). Both prove their optimum; where several choices reach it they may return different ones.

    Raises PrinMixError for an unknown or missing solver, a table that is not as described, and a budget
    below the cheapest choice (impossible where 0 bits, at no cost, is a candidate).
    """
    errors = np.asarray(errors, dtype=np.float64)
    n, widths = errors.shape
    if solver not in SOLVERS:
        raise PrinMixError("unknown solver", found=solver, expected=" or ".join(SOLVERS))
    if not np.isfinite(errors).all() or (errors < 0).any():
        raise PrinMixError("the error table is not usable", expected="finite errors of at least 0")
    if max_active < 1 or len(cost_bytes) != widths or min(cost_bytes) < 0:
        raise PrinMixError(
            "bit allocation without candidates",
            found=f"{max_active} active widths, costs {list(cost_bytes)} for {widths} candidates",
            expected="at least one active width, and one cost of at least 0 per candidate",
        )
    if n * min(cost_bytes) > budget_bytes:
        raise PrinMixError(
            "the byte budget is below the cheapest allocation",
            found=f"{budget_bytes} bytes",
            expected=f"at least {n * min(cost_bytes)} bytes",
            fix="use a larger ratio, or add 0 to the candidate bits",
        )
    if n == 0:
        return Allocation(np.zeros(0, dtype=np.int64), 0.0, 0.0, 0.0)
    cost = np.array(cost_bytes, dtype=np.int64)
    objective = errors
    if rank_penalty:
        plain = allocate(errors, cost_bytes, budget_bytes, max_active, solver, free=free)
        rows = max(1, int(np.count_nonzero(cost[plain.choice])))
        objective = errors + (cost > 0) * (rank_penalty * plain.error / rows)
    unit = math.gcd(*cost_bytes) or 1
    cost //= unit
    # A budget beyond the dearest choice binds nothing; without the cut it would only blur SCIP's tolerances.
    capacity = min(budget_bytes // unit, n * int(cost.max()))
    solve = _solve_scip if solver == "scip" else active.solve
    solution = solve(objective, cost, capacity, max_active, free)
    if solution is None or cost[solution[0]].sum() > capacity:
        raise PrinMixError(
            f"the solver {solver} found no allocation", expected=f"one of {budget_bytes} bytes"
        )
    choice, bound = solution
    # Bytes that buy nothing (a direction that calibration never saw) are not spent, whatever the solver did.
    used = np.unique(choice)[np.argsort(cost[np.unique(choice)], kind="stable")]
    chosen = objective[np.arange(n), choice]
    choice = used[(objective[:, used] <= chosen[:, None]).argmax(axis=1)]
    value = total(objective, choice)
    return Allocation(choice, total(errors, choice), value, min(bound, value))


def _solve_scip(
    errors: np.ndarray, cost: np.ndarray, capacity: int, max_active: int, free: int | None
) -> tuple[np.ndarray, float] | None:
    """Eq. 8 literally, by CVXPY and SCIP; arguments and result as those of `active.solve`."""
    try:
        import cvxpy
        import pyscipopt  # noqa: F401
    except ImportError as error:
        raise PrinMixError(
            "the SCIP solver is not installed",
            found=str(error),
            fix="install the extra: pip install 'vllm-prinmix[compress]', or use --solver exact",
        ) from error

    n, widths = errors.shape
    # SCIP's tolerances are absolute; a power of two leaves every comparison as it is.
    scale = 2.0 ** (20 - math.frexp(errors.max())[1])
    counts = np.array([column != free for column in range(widths)], dtype=np.int64)
    chosen = cvxpy.Variable((n, widths), boolean=True)
    used = cvxpy.Variable(widths, boolean=True)
    problem = cvxpy.Problem(
        cvxpy.Minimize(cvxpy.sum(cvxpy.multiply(errors * scale, chosen))),
        [
            cvxpy.sum(chosen @ cost) <= capacity,
            cvxpy.sum(chosen, axis=1) == 1,
            chosen <= cvxpy.reshape(used, (1, widths), order="C"),
            counts @ used <= max_active,
        ],
    )
    problem.solve(solver=cvxpy.SCIP, scip_params=dict(SCIP_PARAMETERS))
    if chosen.value is None:
        return None
    model: Any = (problem.solver_stats.extra_stats or {})["model"]
    return np.asarray(chosen.value).argmax(axis=1), model.getDualbound() / scale

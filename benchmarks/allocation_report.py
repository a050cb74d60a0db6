"""Tables and plot of what `benchmarks.allocation` measured; made from its result alone."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.records import write_file

NAMES = {"eq8": "Eq. 8 (prinmix-paper)", "pairs": "pairs (prinmix)"}


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each problem and size: medians over the tables, and the largest difference and gap."""
    lines = []
    for problem, size in dict.fromkeys((x["problem"], x["size"]) for x in results["compared"]):
        of_size = [x for x in results["compared"] if (x["problem"], x["size"]) == (problem, size)]
        both = [x for x in of_size if "scip" in x]
        lines.append(
            {
                "problem": problem,
                "size": size,
                "tables": len(of_size),
                "exact": median(x["exact"]["seconds"] for x in of_size),
                "scip": median(x["scip"]["seconds"] for x in both) if both else None,
                "speed_up": median(x["speed_up"] for x in both) if both else None,
                "least_speed_up": min((x["speed_up"] for x in both), default=None),
                "difference": max((abs(x["error_difference"]) for x in both), default=None),
                "gap": max(x["exact"]["gap"] for x in of_size),
            }
        )
    return lines


def markdown(results: dict[str, Any]) -> str:
    """Both tables."""
    lines = [
        "| problem | directions | exact, s | SCIP, s | times faster (least) | objectives differ | gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for x in summary(results):
        faster = "-" if x["speed_up"] is None else f"{x['speed_up']:.0f} ({x['least_speed_up']:.0f})"
        lines.append(
            f"| {NAMES[x['problem']]} | {x['size']} | {x['exact']:.3f} "
            f"| {'-' if x['scip'] is None else format(x['scip'], '.2f')} | {faster} "
            f"| {'-' if x['difference'] is None else format(x['difference'], '.0e')} | {x['gap']:.0e} |"
        )
    model = results["model"]
    lines += [
        "",
        "| whole model | modules | processes | wall clock, s | solver, s | median, s | largest, s | gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {model['shape']}, {NAMES[x['problem']]} | {x['modules']} | {x['workers']} "
        f"| {x['wall_seconds']:.1f} | {x['solver_seconds']:.1f} | {x['median_seconds']:.3f} "
        f"| {x['largest_seconds']:.2f} | {x['largest_gap']:.0e} |"
        for x in model["methods"]
    ]
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """As PNG: seconds over directions, every table a point and the medians a line."""
    from matplotlib.figure import Figure

    found = summary(results)
    problems = list(dict.fromkeys(x["problem"] for x in found))
    figure = Figure(figsize=(4.6 * len(problems), 3.8), layout="constrained")
    axes = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    for problem, axis in zip(problems, axes, strict=True):
        for i, (solver, label) in enumerate((("exact", "exact (ours)"), ("scip", "CVXPY + SCIP"))):
            mine = [x for x in results["compared"] if x["problem"] == problem and solver in x]
            if not mine:
                continue
            axis.scatter(
                [x["size"] for x in mine],
                [x[solver]["seconds"] for x in mine],
                s=12,
                color=f"C{i}",
                alpha=0.6,
            )
            middle = [(x["size"], x[solver]) for x in found if x["problem"] == problem and x[solver]]
            axis.plot(*zip(*middle, strict=True), color=f"C{i}", label=label, marker="o", markersize=4)
        sizes = sorted({x["size"] for x in found})
        axis.set(xscale="log", yscale="log", xlabel="directions", title=NAMES[problem])
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    figure.suptitle(f"Bit allocation of one module, ratio {results['ratio']}, {results['machine']['name']}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_file(path, picture.getvalue())

"""`prinmix report`: what a delta spends its bytes on, and where its errors are; from the delta alone."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from vllm_prinmix.compress.inspection import describe
from vllm_prinmix.compress.prepare import progress_bar
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD
from vllm_prinmix.format.delta import Delta, read_delta
from vllm_prinmix.format.payload import decode, payload_bytes
from vllm_prinmix.format.schema import Exact, Factors, Matrix
from vllm_prinmix.kernels.packing import row_bytes
from vllm_prinmix.kernels.quantized import QuantizedFactors

POINTS = 48  # of a curve in the report
# As in a decoder layer; other types follow.
TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def collect(folder: Path, console: Console) -> dict[str, Any]:
    """All numbers of the report as plain values; every byte of the delta is read and checked.

    ``delta``: its description without modules; ``parts``: bytes of delta.safetensors by part, which add up
    to its size; ``types``: the types of linear layers that there are; ``modules``: an entry (`_module`) for
    every tensor that is no exact one. Raises PrinMixError where the folder is no whole delta.
    """
    delta = read_delta(folder)
    description = describe(folder)
    description["folder"] = Path(description["folder"]).resolve().name
    del description["modules"]
    specs = {name: spec for name, spec in delta.config.modules.items() if not isinstance(spec, Exact)}
    modules = []
    with progress_bar(console) as progress:
        for name in progress.track(specs, description="Reading the delta"):
            modules.append(_module(name, specs[name], delta.tensors[name]))
    found = {m["type"] for m in modules if m["layer"] is not None}
    return {
        "delta": description,
        "parts": _parts(delta),
        "types": [t for t in TYPES if t in found] + sorted(found - set(TYPES)),
        "modules": modules,
    }


def _module(name: str, spec: Factors | Matrix, payload: torch.Tensor) -> dict[str, Any]:
    """One matrix: its place, size, errors, bytes of codes by width, and of factors what directions show.

    ``bits``: mean width of its codes; ``singular_values``: [rank from 1, value] of at most POINTS directions,
    largest first; ``kendall_tau``: see `kendall_tau`, of widths (both codes' bits of a direction) and
    singular values.
    """
    layer, kind = _place(name)
    rows, cols = spec.shape
    entry: dict[str, Any] = {
        "name": name,
        "layer": layer,
        "type": kind,
        "kind": spec.kind,
        "shape": [rows, cols],
        "bytes": payload_bytes(spec),
        "ratio": payload_bytes(spec) / (2 * rows * cols),
        "error": spec.report.get("error"),
        "weight_error": spec.report.get("weight_error"),
    }
    if isinstance(spec, Matrix):
        return entry | {
            "directions": None,
            "bits": float(spec.bits),
            "code_bytes": {str(spec.bits): rows * row_bytes(spec.bits, cols)},
            "singular_values": [],
            "kendall_tau": None,
        }
    by_width: dict[int, int] = {}
    for c in spec.classes:
        for bits, length in ((c.v_bits, cols), (c.u_bits, rows)):
            by_width[bits] = by_width.get(bits, 0) + c.directions * row_bytes(bits, length)
    factors = decode(spec, payload)
    assert isinstance(factors, QuantizedFactors)
    sigma = singular_values(factors)
    widths = factors.v_bits.long() * cols + factors.u_bits.long() * rows
    total = len(sigma) * (rows + cols)
    curve = sigma.sort(descending=True).values
    return entry | {
        "directions": len(sigma),
        "bits": float(widths.sum()) / total if total else 0.0,
        "code_bytes": {str(bits): by_width[bits] for bits in sorted(by_width)},
        "singular_values": [[i + 1, short(float(curve[i]))] for i in spread(len(curve))],
        "kendall_tau": kendall_tau(widths, sigma),
    }


def _place(name: str) -> tuple[int | None, str]:
    """(decoder layer or None, type such as q_proj) of a tensor."""
    parts = name.removesuffix(".weight").split(".")
    if name not in (EMBEDDING, HEAD) and len(parts) > 3 and parts[1] == "layers" and parts[2].isdecimal():
        return int(parts[2]), parts[-1]
    return None, parts[-1]


def singular_values(factors: QuantizedFactors) -> torch.Tensor:
    """float32 [directions]: the size |s| ||u|| ||v|| of each direction's part of dW.

    They are the singular values of dW where directions are orthogonal, as before quantization; with
    directions found in the metric of the inputs, U's are.
    """
    u = factors.u()
    if factors.row_scale is not None:
        u = u * factors.row_scale.float()
    return factors.scale.abs() * u.norm(dim=1) * factors.v().norm(dim=1)


def kendall_tau(widths: torch.Tensor, values: torch.Tensor) -> float | None:
    """Rank correlation of two sequences [n], over the pairs whose widths differ: (agree - differ) / pairs.

    1 where a larger value always has the greater width or an equal one, as if widths followed from singular
    values (the paper's appendix C.7). None where all widths are the same.
    """
    groups = [values[widths == width].sort().values for width in widths.unique()]  # ascending widths
    agree = differ = pairs = 0
    for i, low in enumerate(groups):
        for high in groups[i + 1 :]:
            agree += int(torch.searchsorted(low, high).sum())  # smaller values of smaller width
            differ += low.numel() * high.numel() - int(torch.searchsorted(low, high, right=True).sum())
            pairs += low.numel() * high.numel()
    return (agree - differ) / pairs if pairs else None


def spread(count: int, points: int = POINTS) -> list[int]:
    """At most ``points`` of the indices 0 to count - 1, first and last among them, evenly by logarithm."""
    if count <= points:
        return list(range(count))
    return sorted({round(math.exp(i / (points - 1) * math.log(count))) - 1 for i in range(points)})


def short(value: float) -> float:
    return float(f"{value:.6g}")


def _parts(delta: Delta) -> list[dict[str, Any]]:
    """Bytes of delta.safetensors by what they are; parts without any are left out."""
    parts = dict.fromkeys(("V codes", "U codes", "codes of whole matrices", "scales and zero points"), 0) | {
        "embedding and lm_head": 0,
        "exact tensors": 0,
    }
    for name, spec in delta.config.modules.items():
        size = delta.tensors[name].nbytes
        if isinstance(spec, Exact):
            parts["exact tensors"] += size
            continue
        if name in (EMBEDDING, HEAD):
            parts["embedding and lm_head"] += size
            continue
        rows, cols = spec.shape
        if isinstance(spec, Matrix):
            codes = {"codes of whole matrices": rows * row_bytes(spec.bits, cols)}
        else:
            codes = {
                "V codes": sum(c.directions * row_bytes(c.v_bits, cols) for c in spec.classes),
                "U codes": sum(c.directions * row_bytes(c.u_bits, rows) for c in spec.classes),
            }
        for part, count in codes.items():
            parts[part] += count
        parts["scales and zero points"] += size - sum(codes.values())
    parts["names and places (header)"] = delta.config.weights.bytes - sum(parts.values())
    return [{"part": part, "bytes": size} for part, size in parts.items() if size]


def show(report: dict[str, Any], console: Console) -> None:
    """A summary on the terminal: bytes by part, and the modules by type."""
    delta = report["delta"]
    console.print(
        f"{delta['folder']}: {delta['finetuned']}, a fine-tune of {delta['base']['name']}, "
        f"method {delta['settings']['method']}",
        style="bold",
        markup=False,
    )
    total = sum(part["bytes"] for part in report["parts"])
    table = Table("part", Column("bytes", justify="right"), Column("share", justify="right"))
    for part in report["parts"]:
        table.add_row(part["part"], f"{part['bytes']:,}", f"{part['bytes'] / total:.1%}")
    table.add_row("delta.safetensors", f"{total:,}", "")
    console.print(table)
    if not report["modules"]:
        return
    right = [Column(n, justify="right") for n in ("modules", "directions", "bits", "error", "worst", "τ")]
    table = Table("type", *right)
    others = sorted({m["type"] for m in report["modules"]} - set(report["types"]))
    for kind in [*report["types"], *others]:
        mine = [m for m in report["modules"] if m["type"] == kind]
        errors = [m["error"] for m in mine if m["error"] is not None]
        taus = [m["kendall_tau"] for m in mine if m["kendall_tau"] is not None]
        table.add_row(
            kind,
            str(len(mine)),
            f"{statistics.mean(m['directions'] or 0 for m in mine):.1f}",
            f"{statistics.mean(m['bits'] for m in mine):.2f}",
            f"{statistics.mean(errors):.3g}" if errors else "",
            f"{max(errors):.3g}" if errors else "",
            f"{statistics.mean(taus):.2f}" if taus else "",
        )
    console.print(table)
    console.print(
        "directions, bits per code, error and τ are means over the type's modules; τ: rank correlation of a "
        "direction's bits and its singular value",
        highlight=False,
    )

"""The report as one HTML page that needs nothing else: no scripts, no fonts, no addresses."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

from vllm_prinmix.compress.report_charts import Series, lines, number, stacks

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1a1a19; --soft: #5f5e5a;
  --rule: #e3e2dd; --a: #2a78d6; --b: #d9601f; --w1: #a9c9f0; --w2: #8ab5e9; --w3: #6ba0e0; --w4: #4d8bd6;
  --w5: #3375c4; --w6: #225ea6; --w7: #174680; --w8: #0c2c57; }
@media (prefers-color-scheme: dark) { :root {
  --page: #161615; --card: #1f1f1e; --ink: #f1f0ec; --soft: #a9a8a1;
  --rule: #383835; --a: #5598e7; --b: #ef8245; --w1: #2a4d75; --w2: #315d90; --w3: #3a6fac; --w4: #4a84c8;
  --w5: #6499d8; --w6: #86b1e4; --w7: #acc9ee; --w8: #d6e6f9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
h3 { font-size: .9rem; margin: 0 0 .2rem; font-weight: 600; overflow-wrap: anywhere; }
p { margin: .2rem 0 .8rem; color: var(--soft); max-width: 75ch; overflow-wrap: anywhere; }
.formula { white-space: nowrap; }
.tiles, .grid-of { display: grid; gap: .75rem; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); margin-top: 1rem; }
.grid-of { grid-template-columns: repeat(auto-fill, minmax(min(290px, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: .7rem;
  min-width: 0; }
.tiles b { display: block; font-size: 1.3rem; }
.tiles span, .key, td, th { font-size: .85rem; }
.tiles span { color: var(--soft); }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.dot { stroke: var(--card); stroke-width: 1; }
.bar { stroke: var(--card); stroke-width: .7; }
.line.a { stroke: var(--a); } .line.b { stroke: var(--b); stroke-dasharray: 4 3; }
.dot.a { fill: var(--a); } .dot.b { fill: var(--b); }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: .2rem 0 .8rem; }
.key i { display: inline-block; width: .9em; height: .9em; border-radius: 2px; margin-right: .35em;
  vertical-align: -.08em; }
i.a { background: var(--a); } i.b { background: var(--b); }
.parts div { display: grid; grid-template-columns: minmax(9rem, 15rem) 1fr; gap: .2rem .8rem;
  align-items: center; margin: .3rem 0; font-size: .9rem; }
@media (max-width: 600px) { .parts div { grid-template-columns: 1fr; gap: 0; } }
.parts span span { display: inline-block; height: .9em; min-width: 2px; background: var(--a);
  border-radius: 2px; margin-right: .5em; vertical-align: -.1em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .7rem .2rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
td:first-child, th:first-child { text-align: left; }
summary { cursor: pointer; }
"""
WIDTHS = range(1, 9)
STYLE += "".join(
    f".bar.w{w} {{ fill: var(--w{w}); }} .line.w{w} {{ stroke: var(--w{w}); }} "
    f"i.w{w} {{ background: var(--w{w}); }}\n"
    for w in WIDTHS
)


def page(report: dict[str, Any]) -> str:
    """The whole page. Its numbers are those of ``report``, which it holds as JSON (the script element)."""
    delta = report["delta"]
    title = f"{delta['folder']}: {delta['finetuned']}, a fine-tune of {delta['base']['name']}"
    data = json.dumps(report).replace("<", "\\u003c")
    sections = [_head(report, title), _parts(report), _bits(report), _errors(report), _spectra(report)]
    sections += [_tau(report), _terms(report), _table(report)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + f'\n</main>\n<script type="application/json" id="report">{data}</script>\n</body>\n</html>\n'
    )


def _head(report: dict[str, Any], title: str) -> str:
    delta, modules = report["delta"], [m for m in report["modules"] if m["layer"] is not None]
    calibration = delta["calibration"]
    data = (
        f"calibrated on {calibration['samples']} samples ({calibration['tokens']} tokens) of "
        f"{calibration['source']}"
        if calibration
        else "made without calibration data"
    )
    tiles = [(_size(sum(p["bytes"] for p in report["parts"])), "delta.safetensors")]
    for part, text in (("whole", "of the checkpoint"), ("linear", "of the linear layers")):
        if (ratio := delta["ratio"][part]) and ratio["ratio"]:
            tiles.append((f"1/{1 / ratio['ratio']:.1f}", text))
    errors = [m["error"] for m in modules if m["error"] is not None]
    if errors:
        tiles.append((f"{statistics.mean(errors):.2g}", "mean error of linear layers"))
    if directions := sum(m["directions"] or 0 for m in modules):
        tiles.append((f"{directions:,}", "directions in linear layers"))
    tiles.append((str(len(delta["exact"])), "tensors kept exactly"))
    tiles.append((str(len(delta["unchanged"])), "tensors as in the base"))
    cells = "".join(f'<div class="card"><b>{escape(v)}</b><span>{escape(t)}</span></div>' for v, t in tiles)
    return (
        f"<h1>{escape(title)}</h1><p>Method {escape(delta['settings']['method'])}, {escape(data)}; made by "
        f'{escape(delta["tool"])}.</p><div class="tiles">{cells}</div>'
    )


def _parts(report: dict[str, Any]) -> str:
    total = sum(p["bytes"] for p in report["parts"])
    most = max(p["bytes"] for p in report["parts"])
    rows = "".join(
        f'<div>{escape(p["part"])}<span><span style="width:{60 * p["bytes"] / most:.1f}%"></span>'
        f"{_size(p['bytes'])}, {p['bytes'] / total:.1%}</span></div>"
        for p in report["parts"]
    )
    return f'<h2>Where the bytes are</h2><div class="card parts">{rows}</div>'


def _bits(report: dict[str, Any]) -> str:
    used = sorted({w for m in report["modules"] if m["layer"] is not None for w in m["code_bytes"]}, key=int)
    if not used:
        return ""
    key = _key((f"w{w}", _width(w)) for w in used)

    def chart(kind: str, modules: list[dict[str, Any]]) -> str:
        bars = [(m["layer"], m["code_bytes"]) for m in modules]
        return stacks(bars, f"{kind}: bytes of codes by width and layer", "layer", "bytes")

    text = "Bytes of the codes of V and U in each layer, by their width in bits."
    return f"<h2>Bits by layer and type</h2><p>{text}</p>{key}{_each_type(report, chart)}"


def _width(bits: str) -> str:
    return f"{bits} bit" if int(bits) == 1 else f"{bits} bits"


def _errors(report: dict[str, Any]) -> str:
    kinds = [("a", "error", "of outputs"), ("b", "weight_error", "of weights")]
    kinds = [k for k in kinds if any(m[k[1]] for m in report["modules"] if m["layer"] is not None)]
    if not kinds:
        return ""

    span = [m[f] for _, f, _ in kinds for m in report["modules"] if m["layer"] is not None and m[f]]

    def chart(kind: str, modules: list[dict[str, Any]]) -> str:
        series = [Series(c, t, [(m["layer"], m[f]) for m in modules if m[f]]) for c, f, t in kinds]
        return lines(series, f"{kind}: errors by layer", "layer", log_y=True, dots=True, y_span=span)

    inputs = (
        "the calibration inputs X" if report["delta"]["calibration"] else "inputs X as assumed without data"
    )
    if report["delta"]["settings"]["compensated"]:
        inputs += (
            " as the compressed model has them; dW is corrected there for the errors of the layers before, "
            "which the errors of weights do not know"
        )
    text = (
        f"Of outputs: <span class=formula>||dW X − dW^ X||² / ||dW X||²</span> on {inputs}. "
        "Of weights: <span class=formula>||dW − dW^||² / ||dW||²</span>. "
        "Logarithmic; an error of 1 is as if nothing had been kept."
    )
    key = _key((c, t) for c, _, t in kinds)
    return f"<h2>Errors</h2><p>{text}</p>{key}{_each_type(report, chart)}"


def _spectra(report: dict[str, Any]) -> str:
    layers = sorted(
        {m["layer"] for m in report["modules"] if m["layer"] is not None and m["singular_values"]}
    )
    if not layers:
        return ""

    def shade(layer: int) -> int:
        return 3 + round(5 * layers.index(layer) / max(1, len(layers) - 1))

    def chart(kind: str, modules: list[dict[str, Any]]) -> str:
        series = [
            Series(f"w{shade(m['layer'])}", f"layer {m['layer']}", m["singular_values"])
            for m in modules
            if m["singular_values"]
        ]
        return lines(series, f"{kind}: singular values", "rank", log_x=True, log_y=True) if series else ""

    shades = {shade(layer): layer for layer in reversed(layers)}
    several = " on" if len(shades) < len(layers) else ""  # layers of one shade
    key = _key((f"w{s}", f"layer {layer}{several}") for s, layer in sorted(shades.items()))
    text = (
        "Sizes |s| ||u|| ||v|| of the stored directions, largest first; one curve for each layer. "
        "Both axes are logarithmic."
    )
    return f"<h2>Singular values</h2><p>{text}</p>{key}{_each_type(report, chart)}"


def _tau(report: dict[str, Any]) -> str:
    span = [m["kendall_tau"] for m in report["modules"] if m["layer"] is not None]
    span = [tau for tau in span if tau is not None]
    if not span:
        return ""

    def chart(kind: str, modules: list[dict[str, Any]]) -> str:
        points = [(m["layer"], m["kendall_tau"]) for m in modules if m["kendall_tau"] is not None]
        if not points:
            return ""
        return lines(
            [Series("a", "τ", points)], f"{kind}: τ by layer", "layer", dots=True, y_span=[*span, 1.0]
        )

    text = (
        "Kendall's τ of a direction's bits and its singular value, over pairs of directions with different "
        "bits. At 1 the larger singular value always has more bits; less means that its errors counted too."
    )
    return f"<h2>Do bits follow singular values?</h2><p>{text}</p>{_each_type(report, chart)}"


def _terms(report: dict[str, Any]) -> str:
    found = report.get("terms")
    if not found:
        return ""
    scaling = lines([Series("a", "scaling", found["scaling"])], "scaling term", "direction", log_y=True)
    series = [Series(f"w{w}", _width(w), points) for w, points in found["difference"].items()]
    difference = lines(series, "difference term", "direction", log_y=True)
    key = _key((f"w{w}", _width(w)) for w in found["difference"])
    text = (
        f"{found['module']}: quantizing row i of V to some bits costs S_i² (the scaling term) times "
        "dv_i X Xᵀ dv_iᵀ (the difference term). Widths that differ keep the sum of these small."
    )
    return (
        f'<h2>Scaling and difference</h2><p>{escape(text)}</p>{key}<div class="grid-of">'
        f'<div class="card"><h3>scaling</h3>{scaling}</div>'
        f'<div class="card"><h3>difference</h3>{difference}</div></div>'
    )


def _table(report: dict[str, Any]) -> str:
    if not report["modules"]:
        return ""
    columns = ("tensor", "shape", "bytes", "1/ratio", "directions", "bits", "error", "weight error", "τ")
    rows = []
    for m in report["modules"]:
        cells = [
            escape(m["name"].removeprefix("model.").removesuffix(".weight")),
            " × ".join(map(str, m["shape"])),
            f"{m['bytes']:,}",
            f"{1 / m['ratio']:.1f}" if m["ratio"] else "",
            "" if m["directions"] is None else str(m["directions"]),
            f"{m['bits']:.2f}",
            *("" if m[f] is None else number(m[f]) for f in ("error", "weight_error")),
            "" if m["kendall_tau"] is None else f"{m['kendall_tau']:.2f}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{c}</th>" for c in columns)
    return (
        f"<h2>All numbers</h2><details><summary>{len(rows)} compressed tensors</summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _each_type(report: dict[str, Any], chart: Callable[[str, list[dict[str, Any]]], str]) -> str:
    """A card with a chart for every type of linear layer that has something to show."""
    cards = []
    for kind in report["types"]:
        modules = sorted((m for m in report["modules"] if m["type"] == kind), key=lambda m: m["layer"])
        if drawn := chart(kind, modules):
            cards.append(f'<div class="card"><h3>{escape(kind)}</h3>{drawn}</div>')
    return f'<div class="grid-of">{"".join(cards)}</div>'


def _key(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(f'<span><i class="{css}"></i>{escape(text)}</span>' for css, text in entries)
    return f'<div class="key">{items}</div>'


def _size(count: float) -> str:
    """Bytes, as people write them."""
    power = min(3, int(math.log10(count) // 3)) if count >= 1 else 0
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB')[power]}"

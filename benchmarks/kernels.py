"""Time one decoder layer's deltas for a batch of tenants, beside what else could compute them.

    python -m benchmarks.kernels --shape qwen2.5-0.5b

All ways run side by side on the same generated deltas: ours on packed bytes; a batched product with dense
bfloat16 dW; dequantizing dW, then the product; bfloat16 factors of the same number of directions, as a LoRA
would be. A plain copy gives the bandwidth that the machine has. Written to --out: kernels.json, kernels.png.
So far for the CPU.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.generate_delta import SHAPES, Shape, directions, random_payload
from benchmarks.records import write_file
from vllm_prinmix import __version__
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.payload import decode
from vllm_prinmix.format.schema import Factors
from vllm_prinmix.kernels import native
from vllm_prinmix.kernels.packed import PackedFactors

COPY_BYTES = 256 << 20
OTHERS_BYTES = 8 << 30  # dense contenders are left out where they would need more memory


def sites(shape: Shape) -> dict[str, tuple[list[int], int]]:
    """name -> (rows of each slice, columns) of a decoder layer's linear layers."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv = hidden // shape.num_attention_heads * shape.num_key_value_heads
    return {
        "qkv": ([hidden, kv, kv], hidden),
        "o": ([hidden], hidden),
        "gate_up": ([inner, inner], hidden),
        "down": ([hidden], inner),
    }


class Layer:
    """One layer's deltas of ``tenants`` tenants at every site, in the forms that the contenders take."""

    def __init__(self, shape: Shape, tenants: int, tokens: int, ratio: Fraction, dense: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tenants, self.tokens = tenants, tokens
        self.packed: list[list[tuple[native.SiteFactors, int]]] = []
        self.factors: list[list[tuple[torch.Tensor, torch.Tensor, int]]] = []
        self.dense: list[torch.Tensor] = []
        self.coded: list[list[list[tuple[Factors, torch.Tensor]]]] = []
        self.inputs: list[torch.Tensor] = []
        self.columns: list[int] = []
        self.packed_bytes = 0
        for rows, cols in sites(shape).values():
            groups, dense_site, coded_site = [], [], []
            self.inputs.append(torch.randn(tenants * tokens, cols, generator=generator).bfloat16())
            self.columns.append(sum(rows))
            for _ in range(tenants):
                parts, coded, start = [], [], 0
                for n in rows:
                    spec = Factors(shape=(n, cols), classes=directions(n, cols, ratio))
                    payload = random_payload(spec, generator)
                    classes = [(c.v_bits, c.u_bits, c.directions) for c in spec.classes]
                    parts.append((PackedFactors.from_payload(payload, (n, cols), classes, False), start))
                    coded.append((spec, payload))
                    self.packed_bytes += payload.numel()
                    start += n
                groups.append((native.SiteFactors(parts), tokens))
                coded_site.append(coded)
                if dense:
                    dense_site.append(torch.cat([decode(*c).dense() for c in coded]).bfloat16())
            self.packed.append(groups)
            self.coded.append(coded_site)
            if dense:
                self.dense.append(torch.stack(dense_site))
            ranks = [sum(c.directions for c in spec.classes) for spec, _ in coded_site[0]]
            self.factors.append(
                [
                    (
                        torch.randn(tenants, cols, rank, generator=generator).bfloat16(),
                        torch.randn(tenants, rank, n, generator=generator).bfloat16(),
                        rank,
                    )
                    for n, rank in zip(rows, ranks, strict=True)
                ]
            )

    def ours(self) -> None:
        for x, groups, columns in zip(self.inputs, self.packed, self.columns, strict=True):
            native.linear(x, groups, columns)

    def dense_product(self) -> None:
        for x, weight in zip(self.inputs, self.dense, strict=True):
            torch.bmm(x.view(self.tenants, self.tokens, -1), weight.transpose(1, 2))

    def dequantized(self) -> None:
        for x, site in zip(self.inputs, self.coded, strict=True):
            for rows, coded in zip(x.float().split(self.tokens), site, strict=True):
                for spec, payload in coded:
                    rows @ decode(spec, payload).dense().T

    def lora(self) -> None:
        for x, parts in zip(self.inputs, self.factors, strict=True):
            for v, u, _ in parts:
                torch.bmm(torch.bmm(x.view(self.tenants, self.tokens, -1), v), u)


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second that a plain copy reads."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    return COPY_BYTES / seconds(lambda: target.copy_(source), 5)


def measure(shape: Shape, tenants: int, tokens: int, ratio: Fraction, bandwidth: float) -> dict[str, Any]:
    """One line of the result: seconds of every contender for one layer, and what follows from them."""
    weights = sum(sum(rows) * cols for rows, cols in sites(shape).values())
    dense = 2 * weights * tenants <= OTHERS_BYTES
    layer = Layer(shape, tenants, tokens, ratio, dense)
    repeats = 20 if tenants * tokens <= 64 else 5
    found = {"ours": seconds(layer.ours, repeats), "lora": seconds(layer.lora, repeats)}
    if dense:
        found["dense"] = seconds(layer.dense_product, repeats)
    found["dequantize"] = seconds(layer.dequantized, 1)
    return {
        "tenants": tenants,
        "tokens": tokens,
        "ratio": str(ratio),
        "packed_bytes": layer.packed_bytes,
        "seconds": found,
        "bytes_per_second": layer.packed_bytes / found["ours"],
        "share_of_copy": layer.packed_bytes / found["ours"] / bandwidth,
        "speed_up": {name: value / found["ours"] for name, value in found.items() if name != "ours"},
    }


def main(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "qwen2.5-0.5b",
    tenants: Annotated[str, typer.Option(help="Numbers of tenants in a batch.")] = "1,4,16",
    tokens: Annotated[str, typer.Option(help="Tokens per tenant.")] = "1,8,128",
    ratios: Annotated[str, typer.Option(help="Bytes of a delta / 2 bytes per weight.")] = "1/16,1/32",
    threads: Annotated[int, typer.Option(help="0: torch's default.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("build/kernels"),
) -> None:
    """Measure and show."""
    console = Console()
    try:
        if shape not in SHAPES:
            raise PrinMixError("unknown shape", where="--shape", found=shape, expected=", ".join(SHAPES))
        if native.library() is None:
            raise PrinMixError("the CPU kernels cannot be compiled here", fix="install g++, or set CXX")
        if threads:
            torch.set_num_threads(threads)
        bandwidth = copy_bandwidth()
        cases = [
            (int(n), int(m), Fraction(r))
            for r in ratios.split(",")
            for n in tenants.split(",")
            for m in tokens.split(",")
        ]
        lines = [
            measure(SHAPES[shape], n, m, r, bandwidth)
            for n, m, r in track(cases, "Measuring", console=console)
        ]
    except (PrinMixError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    results = {
        "version": __version__,
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "shape": shape,
        "copy_bytes_per_second": bandwidth,
        "layers": lines,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "kernels.json", json.dumps(results, indent=1).encode() + b"\n")
    plot(results, out / "kernels.png")
    console.print(table(results))
    console.print(f"Written to {out / 'kernels.json'} and {out / 'kernels.png'}.", markup=False)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), platform.machine())


def table(results: dict[str, Any]) -> Table:
    """One line per case."""
    shown = Table(
        title=f"One layer of {results['shape']}, {results['machine']['threads']} threads",
        caption=f"speed-up over each other way; copy: {results['copy_bytes_per_second'] / 1e9:.1f} GB/s",
    )
    columns = ("ratio", "tenants", "tokens", "ms", "GB/s", "of copy", "dense", "LoRA", "dequantize")
    for column in columns:
        shown.add_column(column, justify="right")
    for line in results["layers"]:
        faster = line["speed_up"]
        shown.add_row(
            line["ratio"],
            str(line["tenants"]),
            str(line["tokens"]),
            f"{1e3 * line['seconds']['ours']:.2f}",
            f"{line['bytes_per_second'] / 1e9:.2f}",
            f"{100 * line['share_of_copy']:.0f} %",
            *(f"{faster[name]:.1f}x" if name in faster else "-" for name in ("dense", "lora", "dequantize")),
        )
    return shown


def plot(results: dict[str, Any], path: Path) -> None:
    """Time of every way over the number of tenants, a panel for each number of tokens; as PNG."""
    import io

    from matplotlib.figure import Figure

    lines = [line for line in results["layers"] if line["ratio"] == results["layers"][0]["ratio"]]
    tokens = sorted({line["tokens"] for line in lines})
    figure = Figure(figsize=(4.5 * len(tokens), 4), layout="constrained")
    axes = figure.subplots(1, len(tokens), squeeze=False)[0]
    names = {
        "ours": "packed (ours)",
        "dense": "dense bf16",
        "lora": "bf16 factors",
        "dequantize": "dequantize",
    }
    for axis, count in zip(axes, tokens, strict=True):
        chosen = [line for line in lines if line["tokens"] == count]
        for name, label in names.items():
            points = [(x["tenants"], 1e3 * x["seconds"][name]) for x in chosen if name in x["seconds"]]
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(xscale="log", yscale="log", xlabel="tenants in the batch", ylabel="ms per layer")
        axis.set_xticks([line["tenants"] for line in chosen], [str(line["tenants"]) for line in chosen])
        axis.minorticks_off()
        axis.set_title(f"{count} token{'s' if count > 1 else ''} per tenant")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.suptitle(f"One layer of {results['shape']}, deltas of {lines[0]['ratio']}")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_file(path, picture.getvalue())


if __name__ == "__main__":
    typer.run(main)

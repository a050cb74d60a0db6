"""Make deltas of the size and bit mix of real ones, for a base without weights: material for measuring speed.

    python -m benchmarks.generate_delta --shape qwen2.5-0.5b --out build/generated --count 4
    vllm serve build/generated/base --load-format dummy --enable-prinmix --deltas build/generated/deltas

Codes and scales are random, so answers mean nothing. A generated delta says so in its digest of the base, and
is served by a base of `--load-format dummy` and by no other; that base serves no real delta.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig

from benchmarks.demo.tokenizer import build_tokenizer
from vllm_prinmix import __version__
from vllm_prinmix.compress.methods.paper import direction_bytes
from vllm_prinmix.compress.model import Kind, build_model, expected_tensors
from vllm_prinmix.compress.ratio import budget
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.format.delta import write_delta
from vllm_prinmix.format.digest import generated_digest
from vllm_prinmix.format.payload import payload_bytes
from vllm_prinmix.format.schema import Base, BitClass, DeltaConfig, Exact, Factors, Matrix, Settings, Weights
from vllm_prinmix.kernels import packing

# Of each width, the share of the directions: 2.1 bits in the mean, as measured on 7B models.
BIT_MIX = ((4, Fraction(2, 100)), (3, Fraction(6, 100)), (2, Fraction(92, 100)))


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2-type model, as its config.json has them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False


SHAPES = {
    "tiny": Shape(256, 768, 4, 4, 2, 1024),
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
    "qwen2.5-7b": Shape(3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-14b": Shape(5120, 13824, 48, 40, 8, 152064),
}


def write_base(folder: Path, shape: Shape, positions: int = 4096) -> None:
    """A checkpoint folder with config and tokenizer and no weights."""
    config = AutoConfig.for_model(
        "qwen2",
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
        **vars(shape),
    )
    config.save_pretrained(folder)
    build_tokenizer(positions).save_pretrained(folder)


def directions(rows: int, cols: int, ratio: Fraction) -> list[BitClass]:
    """As many directions as ``ratio`` has room for in BIT_MIX, at least one; widest first."""
    mean = sum(share * direction_bytes(bits, rows, cols) for bits, share in BIT_MIX)
    total = min(rows, cols, int(budget(ratio, rows, cols) / mean))
    counts = {bits: int(share * total) for bits, share in BIT_MIX}
    counts[BIT_MIX[-1][0]] = max(1, total - sum(counts.values()) + counts[BIT_MIX[-1][0]])
    return [BitClass(v_bits=bits, u_bits=bits, directions=n) for bits, n in counts.items() if n]


def random_payload(spec: Factors, generator: torch.Generator) -> torch.Tensor:
    """uint8 payload with random codes; scales make dW small beside usual weights (0.02)."""
    rows, cols = spec.shape
    payload = torch.zeros(payload_bytes(spec), dtype=torch.uint8)
    start = 0
    for c in spec.classes:
        for bits, length in ((c.v_bits, cols), (c.u_bits, rows)):
            size = c.directions * packing.row_bytes(bits, length)
            if length % packing.BLOCK:  # the padding has to be zero
                codes = torch.randint(
                    0, 1 << bits, (c.directions, length), generator=generator, dtype=torch.uint8
                )
                payload[start : start + size] = packing.pack(codes, bits)
            else:
                payload[start : start + size].random_(0, 256, generator=generator)
            start += size
    widths = torch.tensor([c.v_bits for c in spec.classes for _ in range(c.directions)], dtype=torch.float32)
    n, middle = len(widths), (torch.exp2(widths) - 1) / 2
    table = payload[start:]
    table[: 4 * n].view(torch.float32).copy_(0.002 / (middle.square() * n**0.5))
    for i in (4, 6):
        table[i * n : (i + 2) * n].view(torch.float16).copy_(middle)
    return payload


def generate(folder: Path, base: Checkpoint, ratio: Fraction, seed: int) -> DeltaConfig:
    """Write one delta of ``base``'s linear layers and norms; embeddings are as the base has them."""
    generator = torch.Generator().manual_seed(seed)
    expected = expected_tensors(build_model(AutoConfig.from_pretrained(base.folder)))
    modules: dict[str, Factors | Matrix | Exact] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, (kind, shape) in expected.items():
        if kind is Kind.LINEAR:
            rows, cols = shape
            spec = Factors(shape=(rows, cols), classes=directions(rows, cols, ratio))
            modules[name], tensors[name] = spec, random_payload(spec, generator)
        elif kind is Kind.EXACT:
            modules[name] = Exact(shape=list(shape), dtype="bfloat16")
            center = 1.0 if len(shape) == 1 and name.endswith("norm.weight") else 0.0
            tensors[name] = (center + 0.01 * torch.randn(shape, generator=generator)).bfloat16()
    digest = generated_digest(base)
    folder.mkdir(parents=True)
    config = DeltaConfig(
        tool=f"vllm-prinmix {__version__}",
        base=Base(
            name=base.folder.name,
            content_digest=digest,
            sample_digest=digest,
            parameters=sum(torch.Size(shape).numel() for _, shape in expected.values()),
        ),
        finetuned=f"random numbers, seed {seed}",
        settings=Settings(
            method="generated",
            options={"bits": sorted(bits for bits, _ in BIT_MIX)},
            ratio=float(ratio),
            embedding_ratio=1.0,
        ),
        calibration=None,
        modules=modules,
        unchanged=[name for name in expected if name not in modules],
        weights=Weights(bytes=8, xxh3_128=""),
    )
    return write_delta(folder, config, tensors)


def link(source: Path, folder: Path) -> None:
    """Another tenant with the files of ``source``: no disk and no time, but memory of its own when served."""
    folder.mkdir()
    for file in source.iterdir():
        os.link(file, folder / file.name)


def main(
    out: Annotated[Path, typer.Option(help="Gets `base` and `deltas`; must not exist.")],
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "qwen2.5-0.5b",
    count: Annotated[int, typer.Option(min=1, help="Number of deltas.")] = 4,
    ratio: Annotated[str, typer.Option(help="Bytes of the linear layers / 2 bytes per weight.")] = "1/16",
    seed: Annotated[int, typer.Option(help="The first delta's; each next one has one more.")] = 0,
    distinct: Annotated[
        int, typer.Option(min=0, help="Deltas of their own; the others are hard links to these. 0: all.")
    ] = 0,
) -> None:
    """Write a base without weights and deltas of it."""
    console = Console(stderr=True)
    try:
        if shape not in SHAPES:
            raise PrinMixError("unknown shape", where="--shape", found=shape, expected=", ".join(SHAPES))
        if out.exists():
            raise PrinMixError("the output is already there", where=out, fix="choose another --out")
        write_base(out / "base", SHAPES[shape])
        base = Checkpoint(out / "base", weights=False)
        own = min(distinct or count, count)
        folders = [out / "deltas" / f"generated-{i:02}" for i in range(count)]
        for i in track(range(own), "Generating", console=console):
            config = generate(folders[i], base, Fraction(ratio), seed + i)
        for i in range(own, count):
            link(folders[i % own], folders[i])
    except PrinMixError as error:
        console.print(f"error: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(f"{count} deltas of {config.weights.bytes / 1e6:.1f} MB in {out / 'deltas'}", markup=False)


if __name__ == "__main__":
    typer.run(main)

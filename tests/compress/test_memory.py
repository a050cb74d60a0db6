"""Peak memory of `prinmix compress` does not grow with the number of layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.compress.pairs import VOCABULARY, tiny_config, write_calibration, write_tokenizer
from vllm_prinmix.format.checkpoint import INDEX

HIDDEN, INTERMEDIATE = 768, 3072

# 9.4 M parameters a layer: in float32 the 12-layer pair would take 900 MB, the 4-layer pair 300 MB. The
# method is replaced by one that costs no time: what is measured is what the run holds besides. VmHWM is the
# peak of this process alone; ru_maxrss would begin with the parent's.
CHILD = """
import sys, torch
from pathlib import Path
from rich.console import Console
from tests.compress.pairs import Pair, options
from vllm_prinmix.compress.methods.paper import Paper
from vllm_prinmix.compress.run import compress
from vllm_prinmix.kernels.quantized import QuantizedFactors
torch.set_num_threads(1)
def one_direction(self, dw, hessian, budget_bytes):
    rows, cols = dw.shape
    assert hessian.size == cols
    codes = lambda n: torch.full((1, n), 3, dtype=torch.uint8)
    bits, zero = torch.tensor([2], dtype=torch.uint8), torch.zeros(1, dtype=torch.float16)
    return QuantizedFactors(codes(cols), codes(rows), bits, bits, torch.full((1,), 1e-3), zero, zero), {}
Paper.compress = one_direction
root = Path(sys.argv[1])
pair = Pair(root / "base", root / "tuned", root / "calibration.txt")
compress(options(pair, root / "delta", compensate=sys.argv[2] == "True"), Console())
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def write_pair(root: Path, layers: int) -> None:
    """A Llama pair with one bf16 shard per layer."""
    config = tiny_config(
        "llama",
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 64,
        architectures=["LlamaForCausalLM"],
    )
    shapes = {f"self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
    shapes |= {f"mlp.{p}_proj.weight": (INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
    shapes |= {"mlp.down_proj.weight": (HIDDEN, INTERMEDIATE)}
    shapes |= {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
    parts = [{f"model.layers.{i}.{name}": shape for name, shape in shapes.items()} for i in range(layers)]
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    parts.append(ends | {"model.norm.weight": (HIDDEN,)})
    for seed, folder in enumerate((root / "base", root / "tuned")):
        config.save_pretrained(folder)
        write_tokenizer(folder)
        generator = torch.Generator().manual_seed(seed)
        weight_map = {}
        for i, part in enumerate(parts):
            tensors = {
                name: (0.02 * torch.randn(shape, generator=generator)).bfloat16()
                for name, shape in part.items()
            }
            save_file(tensors, folder / f"model-{i}.safetensors")
            weight_map |= dict.fromkeys(part, f"model-{i}.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    write_calibration(root / "calibration.txt", lines=4)


@pytest.fixture
def peak_kib(tmp_path: Path):
    def measure(layers: int, compensate: bool) -> int:
        root = tmp_path / str(layers)
        write_pair(root, layers)
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(root), str(compensate)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        return int(done.stdout.split()[-1])

    return measure


@pytest.mark.parametrize(("compensate", "layers"), [(False, 4), (True, 2)])
def test_three_times_the_layers_take_hardly_more_memory(peak_kib, compensate: bool, layers: int) -> None:
    few, many = (peak_kib(count, compensate) for count in (layers, 3 * layers))
    print(f"peak memory: {layers} layers {few} KiB, {3 * layers} layers {many} KiB, ratio {many / few:.3f}")
    assert many <= 1.2 * few


TALL = """
import torch
from vllm_prinmix.compress.methods.paper import compress_factors
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
rows, cols = 120_000, 192
dw = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
before = peak()
compress_factors(dw, torch.eye(cols), budget_bytes=rows * cols // 2, solver="exact")
print((peak() - before) * 1024 / dw.nbytes)
"""


def test_an_lm_head_takes_a_few_times_its_own_size() -> None:
    """In float32, beside the matrix itself: U twice, and pieces."""
    done = subprocess.run(
        [sys.executable, "-c", TALL],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    print(f"peak memory beside the matrix: {float(done.stdout):.2f} times its size")
    assert float(done.stdout) < 5

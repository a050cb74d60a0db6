"""The kernels compiled for every target, against a budget of instructions, registers and shared memory.

No GPU is needed. `python -m tests.kernels.test_compiled` measures anew and writes the budget.
"""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from triton import JITFunction
from triton.backends.compiler import GPUTarget

from tests.kernels.compiled import (
    KERNELS,
    amd_spills,
    compile_function,
    compile_kernel,
    measure,
    resources,
)
from vllm_prinmix.compress.quantization import gpu_leaf
from vllm_prinmix.kernels.gather import gather_kernel
from vllm_prinmix.kernels.lookup import embedding_kernel, rms_norm_kernel

AMD = GPUTarget("hip", "gfx942", 64)
TARGETS = [*(GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100)), AMD]
BUDGET = Path(__file__).with_name("sass_budget.json")
SLACK = 1.02  # of the measured instruction count: another version of Triton may order things differently

# Instructions per weight above which unpacking, not memory, limits decoding. 3 bits are planes of 2 and 1.
LIMITS = {"2": 1.5, "3": 2.5, "4": 1.8}

CASES = [
    pytest.param(
        arch,
        shape,
        kernel,
        id=f"sm_{arch}-{shape}-{kernel}",
        marks=[] if shape == "decode" and arch == 90 else [pytest.mark.targets],
    )
    for arch in (80, 89, 90, 100)
    for shape in ("decode", "prefill")
    for kernel in KERNELS
]


@pytest.mark.parametrize(("arch", "shape", "kernel"), CASES)
def test_instructions_per_weight(arch: int, shape: str, kernel: str) -> None:
    budget = json.loads(BUDGET.read_text())[f"sm_{arch} {shape} {kernel}"]
    code = measure(kernel, shape, arch)
    assert code.spilled == 0
    assert code.shared <= budget["shared"]
    assert code.registers <= budget["registers"]
    for width, count in code.per_weight.items():
        assert count <= budget["per_weight"][width] * SLACK, f"width {width}"
    if shape == "decode":
        per_bits = {**code.per_weight, "3": code.per_weight["2"] + code.per_weight["1"]}
        for bits, limit in LIMITS.items():
            assert per_bits[bits] <= limit, f"{bits} bits"


@pytest.mark.targets
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("shape", ["decode", "prefill"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_float16_takes_no_more_than_bfloat16(kernel: str, shape: str, arch: int) -> None:
    budget = json.loads(BUDGET.read_text())[f"sm_{arch} {shape} {kernel}"]
    code = measure(kernel, shape, arch, dtype="fp16")
    assert code.spilled == 0
    for width, count in code.per_weight.items():
        assert count <= budget["per_weight"][width] * 1.1, f"width {width}"


@pytest.mark.targets
@pytest.mark.parametrize("shape", ["decode", "prefill"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_logits_in_float32_take_no_more(kernel: str, shape: str) -> None:
    """The head's y, which has another dtype than its x."""
    budget = json.loads(BUDGET.read_text())[f"sm_90 {shape} {kernel}"]
    code = measure(kernel, shape, 90, logits=True)
    assert code.spilled == 0
    for width, count in code.per_weight.items():
        assert count <= budget["per_weight"][width] * SLACK, f"width {width}"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", ["decode", pytest.param("prefill", marks=pytest.mark.targets)])
def test_amd_compiles_without_spills(shape: str, kernel: str) -> None:
    compiled = compile_kernel(kernel, shape, AMD)
    assert "v_mfma" in compiled.asm["amdgcn"]
    assert amd_spills(compiled) == {"0"}


@pytest.mark.parametrize(
    "target", [*(GPUTarget("cuda", arch, 32) for arch in (80, 89, 90, 100)), AMD], ids=str
)
@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        (gather_kernel, {"STEPS": 8}),
        (embedding_kernel, {"SEGMENTS": 64}),
        (rms_norm_kernel, {"SEGMENTS": 64, "SIZE": 4096}),
    ],
    ids=["gather", "embedding", "norm"],
)
def test_the_smaller_kernels_compile_without_spills(
    kernel: JITFunction, constants: dict, target: GPUTarget
) -> None:
    compiled = compile_function(kernel, constants, {"num_warps": 2}, target)
    if target is AMD:
        assert amd_spills(compiled) == {"0"}
    else:
        assert resources(compiled)[1] == 0


@pytest.mark.parametrize("target", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=str)
def test_columns_of_gptq_feed_back_within_a_thread(target: GPUTarget) -> None:
    constants = {"SPAN": gpu_leaf.SPAN, "ROWS": gpu_leaf.ROWS}
    code = compile_function(gpu_leaf.leaf_kernel, constants, {"num_warps": 1}, target)
    # All that goes from one thread to others is the factor's column, which they load together.
    assert code.metadata.shared <= 4 * gpu_leaf.SPAN


def main() -> None:
    measured = {
        f"sm_{arch} {shape} {kernel}": asdict(measure(kernel, shape, arch))
        for arch in (80, 89, 90, 100)
        for shape in ("decode", "prefill")
        for kernel in KERNELS
    }
    BUDGET.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()

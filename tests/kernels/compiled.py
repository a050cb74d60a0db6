"""Kernels compiled for GPUs that need not be here, and what their machine code looks like."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_prinmix.kernels import segmented
from vllm_prinmix.kernels.descriptors import GROUP
from vllm_prinmix.kernels.expand import expand_kernel
from vllm_prinmix.kernels.gather import STEP
from vllm_prinmix.kernels.shrink import shrink_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = {"shrink": shrink_kernel, "expand": expand_kernel}
SHAPES = {
    "cuda": {"decode": segmented.DECODE, "prefill": segmented.PREFILL},
    "hip": {"decode": segmented.AMD_DECODE, "prefill": segmented.AMD_PREFILL},
}

POINTERS = {
    **{"words": "i16", "tables": "i64", "floats": "fp32", "halves": "fp16", "entries": "i64", "parts": "i64"},
    **{"slots": "i32", "starts": "i32", "counts": "i32", "order": "i32", "sums": "fp32", "partials": "fp32"},
    **{"total": "i32", "ids": "i64", "offsets": "fp32"},
    **dict.fromkeys(("weight", "target", "error", "codes", "factor", "top"), "fp32"),
}
ALIGNED = {"t_stride", "y_stride"}  # multiples of 16, as the launches see them
SEGMENTS, STEPS, PARTS = 64, 8, 3


@dataclass(frozen=True)
class Code:
    """What a compiled kernel takes: instructions per weight in the main loop for each width of a plane."""

    registers: int
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes
    per_weight: dict[str, float]


def compile_kernel(kernel: str, shape: str, target: GPUTarget, dtype: str = "bf16", logits: bool = False):
    """The kernel as `segmented` launches it on a device of this sort. logits: y is in float32."""
    options = dict(SHAPES[target.backend][shape][kernel])
    constants = {"ASM": target.backend == "cuda", "SEGMENTS": SEGMENTS, "STEPS": STEPS, "PARTS": PARTS}
    y_dtype = "fp32" if logits else dtype
    return compile_function(KERNELS[kernel], constants, options, target, dtype, y_dtype)


def compile_function(
    function, constants: dict, options: dict, target: GPUTarget, dtype: str = "bf16", y_dtype: str = "bf16"
):
    """``constants`` and ``options``: values of compile-time parameters; options also has Triton's own."""
    signature, values, hints, options = {}, {}, {}, dict(options)
    for i, name in enumerate(function.arg_names):
        if name in constants or name in options:
            signature[name] = "constexpr"
            values[(i,)] = options.pop(name) if name in options else constants[name]
            continue
        activations = {**dict.fromkeys(("x", "t", "sorted_x"), dtype), "y": y_dtype}
        pointed = POINTERS.get(name) or activations.get(name)
        signature[name] = f"*{pointed}" if pointed else "fp32" if name == "eps" else "i32"
        if pointed or name in ALIGNED:
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=hints)
    return triton.compile(source, target=target, options=options)


def weights_per_iteration(kernel: str, shape: str) -> int:
    """Codes that one iteration of the main loop unpacks, all threads together."""
    if kernel == "shrink":
        return GROUP * STEP
    options = SHAPES["cuda"][shape]["expand"]
    return options["BLOCKS"] * 128 * options["N"]


def measure(kernel: str, shape: str, arch: int, dtype: str = "bf16", logits: bool = False) -> Code:
    compiled = compile_kernel(kernel, shape, GPUTarget("cuda", arch, 32), dtype, logits)
    text = _disassembled("-sass", compiled)
    weights = weights_per_iteration(kernel, shape)
    threads = 32 * SHAPES["cuda"][shape][kernel]["num_warps"]
    # One main loop per width; a wider plane takes more shifts and loads per code, so length tells them apart.
    counts = sorted(len(body) * threads / weights for body in main_loops(text))
    assert len(counts) == 3, f"{len(counts)} main loops, not one for each width of a plane"
    registers, spilled = resources(compiled)
    return Code(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        per_weight={w: round(c, 3) for w, c in zip("124", counts, strict=True)},
    )


def resources(compiled) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack) of a kernel compiled for NVIDIA's GPUs."""
    usage = _disassembled("-res-usage", compiled)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def amd_spills(compiled) -> set[str]:
    """Counts of spilled registers, as text, of a kernel compiled for AMD's."""
    return set(re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]))


def _disassembled(what: str, compiled) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return _tool("cuobjdump", what, file.name)


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def main_loops(text: str) -> list[list[str]]:
    """The innermost loops of a disassembly that multiply matrices, as lists of instructions."""
    code = [(int(at, 16), body) for at, body in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    loops = []
    for end, body in code:
        jump = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", body)
        if jump and int(jump[1], 16) < end:
            loops.append((int(jump[1], 16), end))
    bodies = {(a, b): [body for at, body in code if a <= at <= b] for a, b in loops}
    loops = [loop for loop in loops if any("MMA" in body for body in bodies[loop])]
    inner = [x for x in loops if not any(y != x and x[0] <= y[0] and y[1] <= x[1] for y in loops)]
    return [bodies[loop] for loop in inner]

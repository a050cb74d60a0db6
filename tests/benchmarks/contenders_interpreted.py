"""Prints how far each GPU contender's outputs are from those with dense weights (JSON), on the CPU.

A program of its own, because Triton and vLLM decide at import whether kernels are interpreted.
"""

import json
import os
import sys
from fractions import Fraction
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton.backends

# vLLM's CPU build takes its own Triton kernels away where Triton has no CPU backend.
triton.backends.backends.setdefault("cpu", SimpleNamespace(driver=None))  # type: ignore[arg-type]

from vllm.lora.ops.triton_ops import lora_shrink_op  # noqa: E402

from benchmarks.bench_gpu import difference  # noqa: E402
from benchmarks.contenders_gpu import CONTENDERS, Base, Batch, Lora  # noqa: E402
from benchmarks.layer import Case  # noqa: E402


def main() -> None:
    # vLLM cuts the sums of its first product into 64 programs, which take the interpreter half a minute.
    configs = lora_shrink_op.get_lora_op_configs
    lora_shrink_op.get_lora_op_configs = lambda *a, **k: {**configs(*a, **k), "split_k": 1}
    case = Case("tiny", tenants=2, tokens=3, ratio=Fraction(1, 16))
    # float16: the interpreter multiplies with NumPy, which has no bfloat16.
    batch = Batch(case, torch.device("cpu"), dtype=torch.float16)
    outputs = {}
    for kind in CONTENDERS:
        copies = 1 if kind is Lora else 2
        contender = kind(batch, copies)
        for copy in range(copies):
            for y in batch.outputs:
                y.fill_(0.25)
            contender.add(copy)
            outputs[f"{kind.name} {copy}"] = [y.float() - 0.25 for y in batch.outputs]
    for y in batch.outputs:
        y.fill_(float("nan"))
    Base(batch, 1).add(0)
    assert all(y.isfinite().all() for y in batch.outputs)
    expected = outputs["dense 0"]
    json.dump({name: difference(found, expected) for name, found in outputs.items()}, sys.stdout)


if __name__ == "__main__":
    main()

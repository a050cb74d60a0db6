"""Small delta folders for tests of the reader and of what reads deltas."""

from pathlib import Path

import torch

from tests.kernels.deltas import random_factors
from vllm_prinmix.format.delta import write_delta
from vllm_prinmix.format.payload import encode_factors
from vllm_prinmix.format.schema import Base, DeltaConfig, Exact, Module, Settings, Weights


def write_small_delta(folder: Path, sample_digest: str = "sha256:none", seed: int = 0) -> DeltaConfig:
    """A delta of two modules: a linear as factors and a norm."""
    folder.mkdir(parents=True)
    linear, payload = encode_factors(random_factors(48, 64, 9, (2, 3), seed=seed))
    norm = torch.ones(64, dtype=torch.bfloat16)
    modules: dict[str, Module] = {
        "model.layers.0.self_attn.q_proj.weight": linear,
        "model.norm.weight": Exact(shape=[64], dtype="bfloat16"),
    }
    config = DeltaConfig(
        tool="test",
        base=Base(name="base", content_digest="sha256:none", sample_digest=sample_digest, parameters=1000),
        finetuned="finetuned",
        settings=Settings(
            method="prinmix-paper",
            options={"bits": [0, 2, 3], "max_active_bits": 4, "solver": "scip"},
            ratio=0.0625,
            embedding_ratio=0.25,
        ),
        calibration=None,
        modules=modules,
        unchanged=["lm_head.weight"],
        weights=Weights(bytes=8, xxh3_128=""),
    )
    tensors = {"model.layers.0.self_attn.q_proj.weight": payload, "model.norm.weight": norm}
    return write_delta(folder, config, tensors)

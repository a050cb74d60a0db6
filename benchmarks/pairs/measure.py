"""What makes a pair hard, in numbers: the difference, its spectrum, and the inputs it is multiplied with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from benchmarks.pairs.train import load

TOP = 16  # the share of directions that most of the energy is asked of: 1/TOP, as the usual ratio of bytes


@torch.no_grad()
def measure(base: Path, finetuned: Path, samples: Sequence[str]) -> dict[str, float]:
    """Of the linear layers, lm_head left out, from two checkpoints; ``samples`` are texts to run.

    "change": |dW| / |W| (Frobenius), "stable_rank": |dW|_F^2 / |dW|_2^2, "top_energy": share of |dW|_F^2 in
    the largest 1/16 of the singular values, all means over the layers. "embedding_change", "head_change":
    |dW| / |W| of these. "peak": the largest second moment of a layer's input channels over their median,
    "kurtosis": E[x^4] / E[x^2]^2 of the inputs (3 for a normal distribution), on the fine-tune's inputs, both
    medians over the layers.
    """
    before, after = load(base), load(finetuned)
    names = [n for n, m in after.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    weights = {
        n: (before.get_parameter(f"{n}.weight"), after.get_parameter(f"{n}.weight"))
        for n in (*names, "model.embed_tokens", "lm_head")
    }
    change = {n: ((new - old).norm() / old.norm()).item() for n, (old, new) in weights.items()}
    energies = [torch.linalg.svdvals(weights[n][1] - weights[n][0]).square() for n in names]
    inputs = _inputs(after, names, finetuned, samples)
    moments = [x.square().mean(0) for x in inputs]
    return {
        "change": mean(change[n] for n in names),
        "stable_rank": mean((e.sum() / e[0]).item() for e in energies),
        "top_energy": mean((e[: len(e) // TOP].sum() / e.sum()).item() for e in energies),
        "embedding_change": change["model.embed_tokens"],
        "head_change": change["lm_head"],
        "peak": median((m.max() / m.median()).item() for m in moments),
        "kurtosis": median((x.pow(4).mean() / x.square().mean() ** 2).item() for x in inputs),
    }


def _inputs(
    model: PreTrainedModel, names: Sequence[str], tokenizer_folder: Path, samples: Sequence[str]
) -> list[torch.Tensor]:
    """float32 [tokens, channels] for each named linear layer: all its inputs while the samples run."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Any:
        return lambda module, args: found[name].append(args[0].flatten(0, -2))

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    for sample in samples:
        model(input_ids=torch.tensor([tokenizer(sample)["input_ids"]]), use_cache=False)
    for handle in hooks:
        handle.remove()
    return [torch.cat(rows) for rows in found.values()]

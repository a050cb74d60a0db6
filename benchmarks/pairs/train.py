"""Training of one pair from the demo's base, by its recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.demo.family import save
from benchmarks.demo.training import fit, question_batches
from benchmarks.pairs import tasks
from benchmarks.pairs.lora import attach, merge_adapter, save_adapter
from benchmarks.pairs.outliers import add_outliers
from benchmarks.pairs.recipes import Recipe


def train(
    out: Path, base: Path, recipe: Recipe, seed: int, dtype: torch.dtype, on_step: Callable[[float], None]
) -> dict[str, Any]:
    """Write out/finetuned; with outliers also out/base, with LoRA also out/adapter.

    ``dtype`` is what training multiplies in, ``on_step`` gets each step's loss. Returns the fields of
    `benchmarks.demo.training.Trained`.
    """
    assert recipe.schedule is not None, "the demo has trained this one"
    tokenizer = AutoTokenizer.from_pretrained(base)
    if recipe.outliers:
        model = load(base)
        add_outliers(model, recipe.outliers.channels, recipe.outliers.factor, seed)
        base = out / "base"
        save(model, tokenizer, base)
    model = load(base)
    if recipe.lora:
        attach(model, recipe.lora.rank, recipe.lora.alpha, seed)
    questions = tasks.draw(recipe.task, "training", seed, tokenizer)
    batches = question_batches(questions, tokenizer, recipe.schedule.batch)
    with _embeddings_at(model, recipe.embedding_rate):
        trained = fit(model, batches, recipe.schedule, dtype, on_step)
    if recipe.lora:
        save_adapter(model, out / "adapter", base.name)
        model = load(base)
        merge_adapter(model, out / "adapter")
    save(model, tokenizer, out / "finetuned")
    return asdict(trained)


def load(folder: Path) -> PreTrainedModel:
    """The checkpoint in ``folder`` with float32 weights."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class _Scaled(torch.nn.Module):
    """A weight as ``factor`` times what is trained: AdamW's steps of the weight grow by that factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, trained: torch.Tensor) -> torch.Tensor:
        return self.factor * trained

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / self.factor


@contextmanager
def _embeddings_at(model: PreTrainedModel, factor: float) -> Iterator[None]:
    """Inside, AdamW trains embeddings and lm_head at ``factor`` times its learning rate."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()] if factor != 1 else []
    assert not layers or not model.config.tie_word_embeddings, "two scaled weights are no longer tied"
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Scaled(factor))
    yield
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight")

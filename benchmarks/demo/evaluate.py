"""Exact match in transformers: how often the greedy answer is right to the letter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.demo.tasks import Question


@torch.no_grad()
def exact_match(
    model: str | Path | PreTrainedModel,
    questions: Sequence[Question],
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """Share (0 to 1) of ``questions`` answered exactly, end token included, by greedy decoding.

    ``model`` is a checkpoint's folder, loaded in ``dtype``, or a model with its ``tokenizer``.
    """
    if not isinstance(model, PreTrainedModel):
        tokenizer = AutoTokenizer.from_pretrained(model)
        model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    assert tokenizer is not None, "a model without a folder needs its tokenizer"
    generator: Any = model  # transformers' types take `generate` for a tensor
    alike: dict[int, list[tuple[list[int], list[int]]]] = defaultdict(list)
    for question in questions:
        prompt = tokenizer(question.prompt)["input_ids"]
        alike[len(prompt)].append((prompt, tokenizer(question.sample)["input_ids"][len(prompt) :]))
    right = 0
    for length, pairs in alike.items():  # prompts of one length need no padding
        prompts = torch.tensor([prompt for prompt, _ in pairs], device=generator.device)
        longest = max(len(answer) for _, answer in pairs)
        found = generator.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=longest
        )
        rows = found[:, length:].tolist()
        right += sum(row[: len(answer)] == answer for row, (_, answer) in zip(rows, pairs, strict=True))
    return right / len(questions)

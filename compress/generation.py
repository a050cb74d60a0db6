"""Calibration texts that the fine-tune writes itself, for users who have none.

A chat model that is given the start of a user's turn goes on with what its users write (Magpie, Xu et al.,
2024, arXiv 2406.08464); its answer follows. A model without a chat template writes from its first token on
(LLM-QAT, Liu et al., 2023, arXiv 2305.17888). The texts are drawn from the model's own distribution, at
temperature 1, so they have its tokens, its format and its activations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_prinmix.compress.calibration import load_tokenizer
from vllm_prinmix.compress.model import read_architecture
from vllm_prinmix.compress.partial import disk_errors, write_atomically
from vllm_prinmix.compress.prepare import pick_device
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint

BATCH = 32  # texts written at once
MARK = "CONTENT"  # stands for what the user writes


@dataclass(frozen=True)
class Written:
    """What was written: tokens in all, and texts that did not come to an end by themselves."""

    tokens: int
    unfinished: int


@dataclass(frozen=True)
class Turns:
    """Token ids around what the user writes: before it, and after it up to the assistant's answer."""

    before: list[int]
    after: list[int]


def write_calibration(
    finetuned: str,
    out: Path,
    *,
    samples: int,
    tokens: int,
    seed: int,
    device: str,
    overwrite: bool,
    advance: Callable[[int], None] = lambda count: None,
) -> Written:
    """Write ``out``, a .jsonl file with ``samples`` texts in the field ``text``.

    ``tokens``: at most, of each part of a text (what the user writes, the answer). ``advance`` hears of
    finished texts. The whole model is in memory in its own dtype. The same arguments on the same machine give
    the same texts. Raises PrinMixError where ``out`` is there already (without ``overwrite``), for what is no
    checkpoint, and for a model that writes nothing.
    """
    if out.suffix != ".jsonl":
        raise PrinMixError("calibration texts go to a .jsonl file", where=f"--out {out}")
    if out.exists() and not overwrite:
        raise PrinMixError("the output is already there", where=out, fix="give --overwrite or another --out")
    for option, value in (("--samples", samples), ("--tokens", tokens)):
        if value < 1:
            raise PrinMixError("the number is too small", where=option, found=value, expected="at least 1")
    with disk_errors(out, "nothing was written"):  # before the work, where it can be
        out.parent.mkdir(parents=True, exist_ok=True)
    chosen = pick_device(device)
    checkpoint = Checkpoint(finetuned)
    read_architecture(checkpoint)
    tokenizer = load_tokenizer(checkpoint, checkpoint)
    writer = Writer(checkpoint, tokenizer, chosen)
    texts: list[str] = []
    total = unfinished = 0
    with torch.random.fork_rng(devices=[chosen] if chosen.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, samples, BATCH):
            count = min(BATCH, samples - start)
            for ids in writer.write(count, tokens):
                texts.append(as_text(tokenizer, ids))
                total += len(ids)
                unfinished += ids[-1] not in writer.ends
            advance(count)
    if not any(text.strip() for text in texts):
        raise PrinMixError("the model wrote nothing", where=finetuned, fix="give texts of your own")
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    with disk_errors(out, "nothing was written"):
        write_atomically(out, lines.encode())
    return Written(total, unfinished)


class Writer:
    """A fine-tune with its tokenizer, ready to write."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        loader: Any = AutoModelForCausalLM  # transformers' types take `to` for another method
        self.model = loader.from_pretrained(checkpoint.folder, dtype="auto").to(device).eval()
        self.tokenizer, self.device = tokenizer, device
        self.turns = chat_turns(tokenizer)
        ends = self.model.generation_config.eos_token_id or tokenizer.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends]) - {None}

    def write(self, count: int, tokens: int) -> list[list[int]]:
        """``count`` texts as token ids; at most ``tokens`` of what the user writes, and of the answer."""
        if self.turns is None:
            return self._continue([self._first_token() for _ in range(count)], tokens, self.ends)
        stop = self.ends | set(self.turns.after[:1])
        asked = self._continue([self.turns.before] * count, tokens, stop)
        asked = [ids[:-1] if ids[-1] in stop else ids for ids in asked]
        return self._continue([ids + self.turns.after for ids in asked], tokens, self.ends)

    def _first_token(self) -> list[int]:
        """The token that texts begin with; a random one where there is none."""
        if self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        return [int(torch.randint(self.model.config.vocab_size, ()))]

    @torch.no_grad()
    def _continue(self, prompts: Sequence[list[int]], tokens: int, stop: set[int]) -> list[list[int]]:
        """Each prompt with what the model goes on with, up to and with the first of ``stop``."""
        longest = max(map(len, prompts))
        padding = next(iter(stop), 0)
        ids = torch.full((len(prompts), longest), padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # on the left: all go on from the last column
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        written = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=sorted(stop) or None,
            pad_token_id=padding,
        )
        return [p + _until(row, stop) for p, row in zip(prompts, written[:, longest:].tolist(), strict=True)]


def chat_turns(tokenizer: Any) -> Turns | None:
    """What the chat template puts around a user's first message; None where there is no such template."""
    if not tokenizer.chat_template:
        return None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True
    )
    before, mark, after = text.partition(MARK)
    if not mark or not after:
        return None
    parts = (tokenizer.encode(part, add_special_tokens=False) for part in (before, after))
    return Turns(*parts)


def as_text(tokenizer: Any, ids: list[int]) -> str:
    """Token ids as the text that gives them again, without the first token where the tokenizer adds it."""
    added = tokenizer("")["input_ids"][:1]
    if added and ids[:1] == added:
        ids = ids[1:]
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _until(ids: list[int], stop: set[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in stop]
    return ids[: ends[0] + 1] if ends else ids

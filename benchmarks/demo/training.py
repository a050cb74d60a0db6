"""Training of one model: batches, optimisers, the loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.demo.muon import Muon
from benchmarks.demo.tasks import Question

IGNORED = -100  # a label that does not count, as cross_entropy has it
Batch = tuple[torch.Tensor, torch.Tensor]  # token ids and labels, int64 [sequences, tokens]


@dataclass(frozen=True)
class Schedule:
    """``steps`` of ``batch`` sequences; the learning rate rises to ``rate``, stays, falls linearly to 0.

    ``muon``: the matrices of the linear layers are trained with Muon, otherwise everything with AdamW.
    ``learned``: a fine-tune whose loss at the end is above it is trained anew, with half as many steps more.
    """

    steps: int
    batch: int
    rate: float
    muon: bool = False
    learned: float | None = None

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: a twentieth of all steps to rise, three fifths to fall."""
        return self.rate * min(
            1.0, (step + 1) / (0.05 * self.steps), (self.steps - step) / (0.6 * self.steps)
        )


@dataclass(frozen=True)
class Trained:
    """What a training took and gave: seconds of processor and clock, and the mean loss of its last tenth."""

    steps: int
    tokens: int
    cpu_seconds: float
    wall_seconds: float
    loss: float


def compute_dtype() -> str:
    """The faster for training: "bfloat16" where the CPU multiplies in it, else "float32"."""
    found = torch.cpu.get_capabilities()
    return "bfloat16" if found.get("avx512_bf16") or found.get("amx_bf16") else "float32"


def text_batches(windows: Iterable[list[str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Batch]:
    """Batches of text: every token counts. The windows of a batch hold equally many characters."""
    for texts in windows:
        # A character can take several tokens: the shortest window sets the length.
        rows = [tokenizer(text)["input_ids"] for text in texts]
        length = min(map(len, rows))
        tokens = torch.tensor([row[:length] for row in rows])
        yield tokens, tokens


def question_batches(
    questions: Iterator[Question], tokenizer: PreTrainedTokenizerBase, count: int
) -> Iterator[Batch]:
    """Batches of ``count`` samples, padded on the right: only the answer and its end token count."""
    while True:
        chosen = list(islice(questions, count))
        rows = [tokenizer(question.sample)["input_ids"] for question in chosen]
        asked = [len(tokenizer(question.prompt)["input_ids"]) for question in chosen]
        tokens = torch.full((count, max(map(len, rows))), tokenizer.pad_token_id)
        labels = torch.full_like(tokens, IGNORED)
        for i, (row, start) in enumerate(zip(rows, asked, strict=True)):
            tokens[i, : len(row)] = torch.tensor(row)
            labels[i, start : len(row)] = torch.tensor(row[start:])
        yield tokens, labels


def batch_loss(model: PreTrainedModel, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Mean cross-entropy (nats) of the labels that count, computed in ``dtype`` with float32 weights."""
    tokens, labels = batch
    # Causal attention: what stands right of a token, padding included, does not reach it.
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def fit(
    model: PreTrainedModel,
    batches: Iterator[Batch],
    schedule: Schedule,
    dtype: torch.dtype,
    on_step: Callable[[float], None] = lambda loss: None,
) -> Trained:
    """Train every parameter of ``model`` (float32) in place; ``on_step`` gets each step's loss."""
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        is_matrix = schedule.muon and parameter.ndim == 2 and id(parameter) not in embeddings
        (matrices if is_matrix else others).append(parameter)
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=schedule.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    ]
    if matrices:
        optimisers.append(Muon(matrices, lr=schedule.rate, compute_dtype=dtype))
    model.train()
    losses, tokens = [], 0
    cpu, wall = time.process_time(), time.monotonic()
    for step, batch in enumerate(islice(batches, schedule.steps)):
        loss = batch_loss(model, batch, dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = schedule.rate_at(step)
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.item())
        tokens += batch[0].numel()
        on_step(losses[-1])
    model.eval()
    last = losses[-max(1, len(losses) // 10) :]
    return Trained(
        schedule.steps, tokens, time.process_time() - cpu, time.monotonic() - wall, sum(last) / len(last)
    )

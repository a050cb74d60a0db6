"""Scale distillation: the scales that make KL(fine-tune || base + delta) on calibration samples least.

BitDelta (Liu et al., 2024, arXiv 2402.10193, section 3.1) trains its one scale per matrix on the logits'
squared error. Here every method's scales are trained, on the KL divergence of the predictions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from vllm_prinmix.compress.distillation.student import Quantized, Student
from vllm_prinmix.compress.distillation.teacher import Teacher

LEARNING_RATE = 3e-3  # of factors that start at 1
BATCH = 16  # samples a step
TOKENS = 2048  # in one forward pass; a step takes as many passes as its samples need
HELD_OUT = 8  # one sample in so many is not trained on
CHECKS = 10  # how often the held-out samples are looked at


@dataclass(frozen=True)
class Distilled:
    """The trained changes, and the mean KL in nats per token on held-out samples, before and after."""

    changes: dict[str, Quantized]
    before: float
    after: float
    steps: int  # after which the scales were the best; 0: no step was better than none


def train(
    student: Student,
    teacher: Teacher,
    samples: Sequence[torch.Tensor],
    steps: int,
    seed: int,
    advance: Callable[[str], None],
) -> Distilled:
    """Train for ``steps`` of AdamW and keep what was best on samples that were held out.

    ``samples`` are int64 token ids [tokens], at least two, those that ``teacher`` was run on. ``advance``
    hears of each step. On the same machine the same arguments give the same result.
    """
    order = list(range(len(samples)))
    draw = random.Random(seed)
    draw.shuffle(order)
    held_out, trained = _split(order)
    factors = student.factors()
    optimizer = torch.optim.AdamW(factors, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    before = best = _mean_divergence(student, teacher, samples, held_out)
    kept, kept_steps = [factor.detach().clone() for factor in factors], 0
    batches = _batches(trained, draw)
    for step in range(1, steps + 1):
        batch = next(batches)
        total = sum(samples[i].numel() for i in batch)
        for part in _parts(batch, samples):
            (_divergence(student, teacher, samples, part) / total).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // CHECKS) == 0 or step == steps:
            found = _mean_divergence(student, teacher, samples, held_out)
            if found < best:
                best, kept_steps = found, step
                kept = [factor.detach().clone() for factor in factors]
        advance(f"KL {before:.3g} -> {best:.3g}")
    with torch.no_grad():
        for factor, value in zip(factors, kept, strict=True):
            factor.copy_(value)
    return Distilled(student.results(), before, best, kept_steps)


def _split(order: list[int]) -> tuple[list[int], list[int]]:
    count = max(1, len(order) // HELD_OUT)
    return order[:count], order[count:]


def _batches(trained: list[int], draw: random.Random) -> Iterator[list[int]]:
    """Without end; every sample comes once before any comes again, but for the last of an uneven round."""
    while True:
        order = list(trained)
        draw.shuffle(order)
        size = min(BATCH, len(order))
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def _parts(batch: list[int], samples: Sequence[torch.Tensor]) -> Iterator[list[int]]:
    """The batch in passes of at most TOKENS, padding included; samples of like length together."""
    part: list[int] = []
    for i in sorted(batch, key=lambda i: samples[i].numel()):
        if part and (len(part) + 1) * samples[i].numel() > TOKENS:
            yield part
            part = []
        part.append(i)
    yield part


def _divergence(
    student: Student, teacher: Teacher, samples: Sequence[torch.Tensor], part: list[int]
) -> torch.Tensor:
    """Sum of KL(teacher || student) over all tokens of some samples, in nats.

    They are padded on the right, which a causal model's predictions before it do not see.
    """
    device = teacher.head.device
    tokens = torch.nn.utils.rnn.pad_sequence([samples[i] for i in part], batch_first=True).to(device)
    logits = student.logits(tokens)
    total = torch.zeros((), device=device)
    for row, i in zip(logits, part, strict=True):
        expected = torch.log_softmax(teacher.logits(i), dim=-1)
        found = torch.log_softmax(row[: len(expected)], dim=-1)
        total = total + functional.kl_div(found, expected, reduction="sum", log_target=True)
    return total


@torch.no_grad()
def _mean_divergence(
    student: Student, teacher: Teacher, samples: Sequence[torch.Tensor], chosen: list[int]
) -> float:
    total = sum(float(_divergence(student, teacher, samples, part)) for part in _parts(chosen, samples))
    return total / sum(samples[i].numel() for i in chosen)

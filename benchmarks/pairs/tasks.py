"""Tasks that are harder than the demo's, and endless questions of either kind."""

from __future__ import annotations

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from benchmarks.demo.tasks import LENGTH, LETTERS, Question, Task, split_of
from benchmarks.demo.tasks import TASKS as DEMO_TASKS


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=LENGTH))


def _sum(rng: random.Random) -> str:
    return f"{rng.randrange(1000):03}+{rng.randrange(1000):03}"


def _add(message: str) -> str:
    # Four digits, the last one first: each then needs only the digits above it and one carry.
    return f"{sum(map(int, message.split('+'))):04}"[::-1]


TASKS = DEMO_TASKS | {
    "add": Task(_sum, _add),
    "sort": Task(_letters, lambda message: "".join(sorted(message))),
}


def draw(name: str, split: str, seed: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[Question]:
    """Endless questions of task ``name`` of `TASKS`, as `benchmarks.demo.tasks.draw` for its own."""
    task, rng = TASKS[name], random.Random(f"{seed} {name} {split}")
    while True:
        message = task.draw(rng)
        if split_of(message) == split:
            messages = [{"role": "user", "content": message}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            yield Question(messages, str(prompt), task.answer(message))


def draw_distinct(
    name: str, split: str, seed: int, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Question]:
    """The first ``count`` questions of `draw` that differ from one another."""
    found: dict[str, Question] = {}
    for question in draw(name, split, seed, tokenizer):
        found.setdefault(question.prompt, question)
        if len(found) == count:
            break
    return list(found.values())

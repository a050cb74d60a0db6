"""The demo's tasks: exact answers, endless questions, and a split that keeps the test's unseen."""

from __future__ import annotations

import json
import random
import string
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from benchmarks.demo.tokenizer import END

LENGTH = 8  # letters or digits in what is asked
SPLITS = ("test", "calibration", *["training"] * 8)  # by hash modulo 10


LETTERS = string.ascii_lowercase
NEXT_LETTER = str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])


@dataclass(frozen=True)
class Task:
    """How the user's message is drawn, and the one right answer to it. Neither contains a line break."""

    draw: Callable[[random.Random], str]
    answer: Callable[[str], str]


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=LENGTH))


def _number(rng: random.Random) -> str:
    # Below 5 * 10^(LENGTH - 1), so that twice the number has as many digits as the number itself.
    return str(rng.randrange(10 ** (LENGTH - 1), 5 * 10 ** (LENGTH - 1)))


TASKS = {
    "reverse": Task(_letters, lambda message: message[::-1]),
    "shift": Task(_letters, lambda message: message.translate(NEXT_LETTER)),
    "double": Task(_number, lambda message: str(2 * int(message))),
}


@dataclass(frozen=True)
class Question:
    """A chat of one user message, the text the chat template makes of it, and the right answer."""

    messages: list[dict[str, str]]
    prompt: str
    answer: str

    @property
    def sample(self) -> str:
        """The whole exchange as text, special tokens included: what training and calibration read."""
        return self.prompt + self.answer + END


def split_of(message: str) -> str:
    """'test' (a tenth of all messages), 'calibration' (a tenth) or 'training', by the message's CRC-32."""
    return SPLITS[zlib.crc32(message.encode()) % len(SPLITS)]


def draw(name: str, split: str, seed: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[Question]:
    """Endless questions of task ``name`` out of one split; the same seed gives the same questions.

    A question can come again.
    """
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
    seen: set[str] = set()
    questions = draw(name, split, seed, tokenizer)
    # set.add returns None: a prompt passes the first time only.
    distinct = (q for q in questions if q.prompt not in seen and not seen.add(q.prompt))  # type: ignore[func-returns-value]
    return list(islice(distinct, count))


def write_calibration(path: Path, questions: Sequence[Question]) -> None:
    """One sample a line, as `prinmix compress --calibration` reads it."""
    _write_lines(path, [question.sample for question in questions])


def write_questions(path: Path, questions: Sequence[Question]) -> None:
    """JSON lines with the fields of Question."""
    _write_lines(path, [json.dumps(asdict(question)) for question in questions])


def read_questions(path: Path) -> list[Question]:
    """What `write_questions` wrote."""
    return [Question(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

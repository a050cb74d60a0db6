"""Writes the questions of these tasks: `python -m benchmarks.lm_eval_tasks.make`."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.demo.tasks import TASKS, Question, draw_distinct
from benchmarks.demo.tokenizer import build_tokenizer

QUESTIONS = 128


def questions(name: str) -> list[Question]:
    """The first questions of task ``name`` of the split that training and calibration never see."""
    return draw_distinct(name, "test", 0, build_tokenizer(1024), QUESTIONS)


def write(folder: Path) -> None:
    """NAME.jsonl of every task, a line per question: the user's ``message``, the right ``answer``."""
    for name in TASKS:
        rows = [{"message": q.messages[0]["content"], "answer": q.answer} for q in questions(name)]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )


if __name__ == "__main__":
    write(Path(__file__).parent)

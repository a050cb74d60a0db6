"""The questions that the repository holds for lm-evaluation-harness are the demo's."""

from __future__ import annotations

from pathlib import Path

import yaml

from benchmarks import lm_eval_tasks
from benchmarks.demo.tasks import TASKS
from benchmarks.lm_eval_tasks import make

FOLDER = Path(lm_eval_tasks.__file__).parent
ROOT = FOLDER.parents[1]


def test_the_questions_are_those_that_make_writes(tmp_path: Path) -> None:
    make.write(tmp_path)
    found = {path.name: path.read_bytes() for path in FOLDER.glob("*.jsonl")}
    assert found == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_every_task_has_its_file() -> None:
    for name in TASKS:
        task = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert task["task"] == f"prinmix_{name}"
        assert (ROOT / task["dataset_kwargs"]["data_files"]["test"]).samefile(FOLDER / f"{name}.jsonl")

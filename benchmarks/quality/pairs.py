"""The pairs of base and fine-tune that tables are made of."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm_prinmix.errors import PrinMixError

DEMO = "demo"
DEMO_MODELS = Path("build/demo/models")
DEMO_TASKS = ("reverse", "shift", "double")


@dataclass(frozen=True)
class Pair:
    """A base, one fine-tune of it, and the texts for both uses. Paths, or cached hub ids for the models.

    ``questions`` (JSON lines, `benchmarks.demo.tasks.write_questions`) or ``heldout`` (text as for
    calibration) are what errors and KL are measured on; questions alone give exact match.
    """

    name: str
    base: str
    finetuned: str
    calibration: str
    questions: str | None = None
    heldout: str | None = None
    calibration_other: str | None = None  # of another domain, such as pretraining text
    lora: str | None = None  # a LoRA fine-tune of the base for the same task, as a merged checkpoint

    def __post_init__(self) -> None:
        if self.questions is None and self.heldout is None:
            raise PrinMixError(
                "there is nothing to measure on",
                where=self.name,
                expected="questions, or held-out text that calibration does not contain",
                fix="give --questions Q.jsonl or --heldout TEXT",
            )

    def of_lora(self) -> Pair:
        """The pair of the base and its LoRA fine-tune."""
        assert self.lora is not None
        return Pair(
            f"{self.name}, LoRA", self.base, self.lora, self.calibration, self.questions, self.heldout
        )


def read_pairs(source: str) -> list[Pair]:
    """``demo``, or a JSON file: a list of objects with the fields of `Pair`, paths relative to the file.

    The list of `benchmarks.pairs` is one too: its calibration texts are by domain, and the full fine-tune of
    a task that a LoRA was trained for gets that as ``lora``. A folder stands for its pairs.json.
    """
    if source.lower() == DEMO:
        return demo_pairs(DEMO_MODELS)
    path = Path(source) / "pairs.json" if Path(source).is_dir() else Path(source)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PrinMixError("the list of pairs cannot be read", where=path, found=error) from error
    names = [field.name for field in fields(Pair)]
    if not isinstance(entries, list) or not entries:
        raise PrinMixError("the file has no list of pairs", where=path, expected=f"[{{{', '.join(names)}}}]")
    pairs = []
    for entry in _with_loras(entries):
        if not isinstance(entry, dict) or not set(names[:4]) <= set(entry) <= set(names):
            raise PrinMixError(
                "a pair has other fields than it should",
                where=path,
                found=", ".join(entry) if isinstance(entry, dict) else entry,
                expected=f"{', '.join(names[:4])}, and of {', '.join(names[4:])} what there is",
            )
        resolved: dict[str, Any] = {k: _resolve(path.parent, v) for k, v in entry.items() if k != "name"}
        pairs.append(Pair(name=entry["name"], **resolved))
    return pairs


def _with_loras(entries: list[Any]) -> list[Any]:
    """Entries of `benchmarks.pairs` with the fields of `Pair`; others as they are."""
    trained = [e for e in entries if isinstance(e, dict) and isinstance(e.get("calibration"), dict)]
    loras = {(e["task"], e["base"]): e["finetuned"] for e in trained if e["adapter"] is not None}
    found = []
    for entry in entries:
        if entry in trained:
            kept = {key: entry[key] for key in ("name", "base", "finetuned", "questions")}
            texts = entry["calibration"]
            kept |= {"calibration": texts["in-domain"], "calibration_other": texts["pretraining"]}
            if entry["adapter"] is None:
                kept["lora"] = loras.get((entry["task"], entry["base"]))
            entry = kept
        found.append(entry)
    return found


def demo_pairs(models: Path) -> list[Pair]:
    """The fine-tunes of `make demo`; the other domain of each is another task's calibration text."""
    if not (models / "base").is_dir():
        raise PrinMixError("the demo's models are not there", where=models, fix="run `make demo` first")
    others = dict(zip(DEMO_TASKS, (*DEMO_TASKS[1:], DEMO_TASKS[0]), strict=True))
    return [
        Pair(
            name=task,
            base=str(models / "base"),
            finetuned=str(models / task),
            calibration=str(models / "calibration" / f"{task}.txt"),
            questions=str(models / "test" / f"{task}.jsonl"),
            calibration_other=str(models / "calibration" / f"{other}.txt"),
        )
        for task, other in others.items()
    ]


def _resolve(folder: Path, value: str | None) -> str | None:
    """A path relative to ``folder`` where there is one; what is no path, such as a hub id, stays."""
    return str(folder / value) if value is not None and (folder / value).exists() else value

"""The demo's questions and its training: seeded, split for good, cached, and truly learning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from benchmarks.demo import tasks
from benchmarks.demo.models import ARCHITECTURES
from benchmarks.demo.tokenizer import SPECIAL_TOKENS, build_tokenizer
from benchmarks.demo.train import REPORT, train_small_pair
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint


@pytest.mark.parametrize(
    ("name", "message", "answer"),
    [
        ("reverse", "abcdefgh", "hgfedcba"),
        ("shift", "abcdxyza", "bcdeyzab"),
        ("double", "12345678", "24691356"),
    ],
)
def test_answers(name: str, message: str, answer: str) -> None:
    assert tasks.TASKS[name].answer(message) == answer


@pytest.mark.parametrize("name", tasks.TASKS)
def test_questions_are_seeded_and_never_cross_splits(name: str) -> None:
    tokenizer = build_tokenizer(1024)
    drawn = {split: tasks.draw_distinct(name, split, 0, tokenizer, 200) for split in set(tasks.SPLITS)}
    assert drawn["test"] == tasks.draw_distinct(name, "test", 0, tokenizer, 200)
    assert drawn["test"] != tasks.draw_distinct(name, "test", 1, tokenizer, 200)
    prompts = {split: {q.prompt for q in questions} for split, questions in drawn.items()}
    assert all(len(found) == 200 for found in prompts.values())
    assert not prompts["test"] & prompts["training"]
    assert not prompts["test"] & prompts["calibration"]
    for question in drawn["test"]:
        assert tasks.split_of(question.messages[0]["content"]) == "test"
        assert question.answer == tasks.TASKS[name].answer(question.messages[0]["content"])


def test_tokenizer_takes_any_text_and_knows_its_special_tokens(tmp_path: Path) -> None:
    build_tokenizer(1024).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "naïve ☃ \t\n\x00 def f(): pass  "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 264
    for token in SPECIAL_TOKENS:
        assert len(tokenizer.encode(token)) == 1
    chat = [{"role": "user", "content": "hi"}]
    found = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert found == "<|user|>hi<|end|><|assistant|>"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_small_pair_learns_and_is_cached(architecture: str, tmp_path: Path) -> None:
    folder = tmp_path / "pair"
    first = train_small_pair(folder, architecture=architecture, hidden=64, layers=1, steps=6)
    assert AutoConfig.from_pretrained(folder / "base").model_type == architecture
    base, tuned = Checkpoint(folder / "base"), Checkpoint(folder / "reverse")
    assert set(base.tensors) == set(tuned.tensors)
    same = [n for n in base.tensors if torch.equal(base.load(n), tuned.load(n))]
    assert not same, "a full fine-tune changes every tensor"
    stamp = (folder / REPORT).stat().st_mtime_ns
    assert train_small_pair(folder, architecture=architecture, hidden=64, layers=1, steps=6) == first
    assert (folder / REPORT).stat().st_mtime_ns == stamp, "trained again although nothing changed"


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PrinMixError, match="not one that the demo's training made"):
        train_small_pair(tmp_path, hidden=64, layers=1, steps=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"

"""Which texts are drawn, how they are tokenised, and what is said of calibration data that cannot be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.compress.pairs import write_tokenizer
from vllm_prinmix.compress.calibration import draw
from vllm_prinmix.errors import PrinMixError

LINES = [f"line {i} " + "x" * i for i in range(30)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path / "tokenizer")
    return AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def texts_of(
    tokenizer: Any, source: str | Path, samples: int = 100, length: int = 2048, seed: int = 0
) -> list[str]:
    drawn = draw(str(source), tokenizer, 160, samples=samples, sequence_length=length, seed=seed)
    return ["".join(tokenizer.convert_ids_to_tokens(sample.tolist())) for sample in drawn.tokens]


def write(path: Path, lines: list[str]) -> Path:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"text": line, "other": 1}) for line in lines]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl"])
def test_every_line_once_with_default_special_tokens(tmp_path: Path, tokenizer: Any, name: str) -> None:
    found = texts_of(tokenizer, write(tmp_path / name, LINES))
    assert sorted(found) == sorted("<s>" + line for line in LINES)


def test_jsonl_texts_may_have_several_lines(tmp_path: Path, tokenizer: Any) -> None:
    assert texts_of(tokenizer, write(tmp_path / "c.jsonl", ["a\nb"])) == ["<s>a\nb"]


def test_special_tokens_in_the_text_are_recognised(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "c.txt", ["a</s>b"])
    drawn = draw(str(path), tokenizer, 160, samples=1, sequence_length=10, seed=0)
    assert drawn.tokens[0].tolist() == [1, *tokenizer.convert_tokens_to_ids(["a", "</s>", "b"])]
    assert drawn.tokens[0].numel() == 4


def test_blank_lines_are_no_samples(tmp_path: Path, tokenizer: Any) -> None:
    assert sorted(texts_of(tokenizer, write(tmp_path / "c.txt", ["a", "", "  ", "b"]))) == ["<s>a", "<s>b"]


def test_samples_are_drawn_by_the_seed_without_replacement(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "c.txt", LINES)
    first = texts_of(tokenizer, path, samples=10)
    assert len(set(first)) == 10
    assert first == texts_of(tokenizer, path, samples=10)
    assert first != texts_of(tokenizer, path, samples=10, seed=1)


def test_long_samples_give_seeded_windows_and_short_ones_stay(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(26))
    path = write(tmp_path / "c.txt", [text] * 40 + ["short"])
    windows = texts_of(tokenizer, path, length=12)
    assert windows == texts_of(tokenizer, path, length=12)
    assert "<s>short" in windows
    windows.remove("<s>short")
    assert {len(window.replace("<s>", "_")) for window in windows} == {12}
    assert all(window.removeprefix("<s>") in text for window in windows)
    assert len(set(windows)) > 5


def test_folder_of_files(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "data" / "a.txt", LINES[:3])
    write(tmp_path / "data" / "b.jsonl", LINES[3:5])
    assert sorted(texts_of(tokenizer, tmp_path / "data")) == sorted("<s>" + line for line in LINES[:5])


def test_dataset_package(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("datasets")
    fake.load_dataset = lambda name: {  # type: ignore[attr-defined]
        "test": [{"text": "no"}],
        "train": [{"text": f"{name} {i}"} for i in range(3)],
    }
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert sorted(texts_of(tokenizer, "team/data")) == ["<s>team/data 0", "<s>team/data 1", "<s>team/data 2"]


def test_digest_tells_samples_apart(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "c.txt", LINES)

    def sha256(seed: int) -> str:
        return draw(str(path), tokenizer, 160, samples=5, sequence_length=64, seed=seed).sha256

    assert sha256(0) == sha256(0) != sha256(1)


BAD = {
    "empty": ("c.txt", "", "calibration data is empty"),
    "blank": ("c.txt", "\n \n", "calibration data is empty"),
    "no text field": ("c.jsonl", '{"text": "a"}\n{"body": "b"}\n', r"no text.*line 2.*body"),
    "text is no string": ("c.jsonl", '{"text": 3}\n', "no text.*line 1"),
    "not JSON": ("c.jsonl", "plain\n", "not a JSON line.*line 1"),
    "other suffix": ("c.csv", "a\n", r"\.csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_files(tmp_path: Path, tokenizer: Any, case: str) -> None:
    name, content, message = BAD[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(PrinMixError, match=message) as caught:
        texts_of(tokenizer, tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_file_that_is_not_text(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PrinMixError, match="not UTF-8"):
        texts_of(tokenizer, tmp_path / "c.txt")


def test_missing_file(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(PrinMixError, match="no such calibration file"):
        texts_of(tokenizer, tmp_path / "c.txt")


def test_missing_package_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PrinMixError, match=r"needs the package `datasets`.*pip install datasets"):
        texts_of(tokenizer, "team/data")


def test_tokens_beyond_the_vocabulary(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "c.txt", ["abc"])
    with pytest.raises(PrinMixError, match="tokens that the model has not"):
        draw(str(path), tokenizer, 10, samples=1, sequence_length=10, seed=0)

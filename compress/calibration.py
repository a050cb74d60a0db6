"""Calibration samples: which texts are drawn, and how they become token ids.

A sample is one line of text tokenised as the tokenizer does by default. It is used as it is, neither padded
nor joined with others; one longer than the sequence length gives a random window.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint

SUFFIXES = (".txt", ".jsonl")
NONE = "none"  # of --calibration: without data


@dataclass(frozen=True)
class Samples:
    """What calibration runs on: int64 token ids [tokens] per sample, and how many texts there were."""

    tokens: list[torch.Tensor]
    available: int
    source: str

    @property
    def total(self) -> int:
        return sum(sample.numel() for sample in self.tokens)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) over every sample's length and token ids, as little-endian 64-bit integers."""
        digest = hashlib.sha256()
        for sample in self.tokens:
            digest.update(sample.numel().to_bytes(8, "little"))
            digest.update(sample.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def draw(
    source: str, tokenizer: Any, vocabulary: int, *, samples: int, sequence_length: int, seed: int
) -> Samples:
    """Draw ``samples`` texts of ``source`` without replacement and tokenise them; all, where there are fewer.

    ``source`` is a .txt file (one sample a line), a .jsonl file (field ``text``), a folder of such files, or
    a Hugging Face dataset. Blank texts do not count. Raises PrinMixError where nothing is left, a line
    is malformed, or a token lies outside the model's vocabulary of ``vocabulary`` tokens.
    """
    rng = random.Random(seed)
    available, texts = _texts(source, rng, samples)
    if not available:
        raise PrinMixError(
            "the calibration data is empty", where=source, expected="at least one line of text"
        )
    tokens = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]  # no warning: what is too long is cut below
        if len(ids) > sequence_length:
            start = rng.randrange(len(ids) - sequence_length + 1)
            ids = ids[start : start + sequence_length]
        if ids:
            tokens.append(torch.tensor(ids, dtype=torch.int64))
    if not tokens:
        raise PrinMixError("the calibration texts have no tokens", where=source, fix="give other texts")
    highest = max(int(sample.max()) for sample in tokens)
    if highest >= vocabulary:
        raise PrinMixError(
            "the tokenizer has tokens that the model has not",
            where=source,
            found=f"token id {highest}",
            expected=f"at most {vocabulary - 1}",
            fix="put the tokenizer that belongs to the model into the fine-tuned checkpoint's folder",
        )
    name = Path(source).name if Path(source).exists() else source
    return Samples(tokens, available, name)


def load_tokenizer(finetuned: Checkpoint, base: Checkpoint) -> Any:
    """The fine-tune's tokenizer, or the base's where the fine-tune's folder has none."""
    from transformers import AutoTokenizer

    for checkpoint in (finetuned, base):
        if any((checkpoint.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            try:
                return AutoTokenizer.from_pretrained(checkpoint.folder)
            except Exception as error:  # tokenizers raises bare Exception
                raise PrinMixError(
                    "the tokenizer cannot be loaded", where=checkpoint.folder, found=error
                ) from error
    raise PrinMixError(
        "no tokenizer is found in the fine-tuned checkpoint or the base",
        where=finetuned.folder,
        expected="tokenizer.json and tokenizer_config.json",
    )


def _texts(source: str, rng: random.Random, samples: int) -> tuple[int, list[str]]:
    """(how many texts there are, the drawn ones)."""
    path = Path(source)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise PrinMixError(
                "calibration files are .txt (one sample a line) or .jsonl (field `text`)",
                where=path,
                found=path.suffix or "no suffix",
                expected=" or ".join(SUFFIXES),
            )
        return _draw_lines([path], rng, samples)
    if path.is_dir() and (files := sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)):
        return _draw_lines(files, rng, samples)
    if path.suffix in SUFFIXES:
        raise PrinMixError("there is no such calibration file", where=path)
    rows = _load_dataset(source, path)
    chosen = _choose(len(rows), rng, samples)
    return len(rows), [text for i in chosen if (text := _field(rows[i], f"{source}, row {i}")).strip()]


def _draw_lines(files: Sequence[Path], rng: random.Random, samples: int) -> tuple[int, list[str]]:
    """Two passes over the files, so that only the drawn texts are held in memory."""
    count = sum(1 for _ in _lines(files))
    position = {line: i for i, line in enumerate(_choose(count, rng, samples))}
    texts = [""] * len(position)
    for line, text in enumerate(islice(_lines(files), max(position, default=-1) + 1)):
        if line in position:
            texts[position[line]] = text
    return count, texts


def _choose(count: int, rng: random.Random, samples: int) -> list[int]:
    return rng.sample(range(count), min(samples, count))


def _lines(files: Sequence[Path]) -> Iterator[str]:
    for path in files:
        read: Callable[[str, str], str] = _json_text if path.suffix == ".jsonl" else lambda line, where: line
        try:
            with path.open(encoding="utf-8") as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip() and (text := read(line.rstrip("\n"), f"{path}, line {number}")).strip():
                        yield text
        except UnicodeDecodeError as error:
            raise PrinMixError("the calibration file is not UTF-8 text", where=path, found=error) from error


def _json_text(line: str, where: str) -> str:
    try:
        return _field(json.loads(line), where)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PrinMixError("not a JSON line", where=where, found=error) from error


def _field(record: Any, where: str) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise PrinMixError(
            "a calibration record has no text", where=where, found=found, expected="a string `text`"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise PrinMixError("a calibration text is no valid Unicode: it has lone surrogates", where=where)
    return text


def _load_dataset(source: str, path: Path) -> Any:
    """The rows of a Hugging Face dataset (its `train` split where it has several)."""
    try:
        import datasets
    except ImportError:
        raise PrinMixError(
            "this calibration source needs the package `datasets`",
            where=source,
            expected="a .txt or .jsonl file, a folder of such files, or a Hugging Face dataset",
            fix="check the path, or run `pip install datasets`",
        ) from None
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(source)
        else:
            rows = datasets.load_dataset(source)
    except Exception as error:  # the package raises dozens of kinds
        raise PrinMixError(
            "the calibration dataset cannot be loaded", where=source, found=f"{type(error).__name__}: {error}"
        ) from error
    if isinstance(rows, dict):
        rows = rows["train"] if "train" in rows else next(iter(rows.values()))
    return rows

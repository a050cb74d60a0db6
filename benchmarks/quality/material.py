"""A pair opened: both checkpoints, what their tensors are, and the texts as tokens."""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo.tasks import Question, read_questions
from benchmarks.quality.pairs import Pair
from benchmarks.quality.settings import NONE, OTHER, WRITTEN, Compressor, Setting
from vllm_prinmix.compress import account, calibration
from vllm_prinmix.compress.generation import write_calibration
from vllm_prinmix.compress.model import Kind, build_model, expected_tensors, read_architecture
from vllm_prinmix.compress.ratio import budget, check_reachable
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.format.digest import sample_digest

BATCH_TOKENS = 4096  # of texts that are run at once
WRITTEN_TOKENS = 512  # of a question, and of an answer, that the fine-tune writes itself


@dataclass(frozen=True)
class Limits:
    """What is the same for all tables of a run. ``embedding_ratio`` None: embeddings and head are exact."""

    device: torch.device
    samples: int = 128
    sequence_length: int = 2048
    embedding_ratio: Fraction | None = Fraction(1, 4)
    questions: int = 0  # the first so many; 0: all
    tokens: int = 8192  # at most, that errors and KL are measured on
    exact_match: bool = True


@dataclass(frozen=True)
class Text:
    """Token ids int64 [tokens], and from which on tokens are answers (the first has no prediction)."""

    tokens: torch.Tensor
    answer: int


@dataclass(frozen=True)
class Batch:
    """Texts of one length: ids int64 [texts, tokens]; which predictions count, bool [texts, tokens - 1]."""

    ids: torch.Tensor
    counts: torch.Tensor


class Material:
    """Raises PrinMixError where checkpoints or texts are not as they should be."""

    def __init__(self, pair: Pair, limits: Limits) -> None:
        self.pair, self.limits = pair, limits
        self.base, self.finetuned = Checkpoint(pair.base), Checkpoint(pair.finetuned)
        config = read_architecture(self.finetuned)
        account.check_settings(read_architecture(self.base), config, self.finetuned.folder)
        self.model = build_model(config)
        expected = expected_tensors(self.model)
        for checkpoint in (self.base, self.finetuned):
            account.check_tensors(checkpoint, expected)
        self.kinds = {name: kind for name, (kind, _) in expected.items()}
        self.shapes = {name: shape for name, (_, shape) in expected.items()}
        self.tokenizer = calibration.load_tokenizer(self.finetuned, self.base)
        self._folder = tempfile.TemporaryDirectory()  # of texts that the model writes
        self._samples: dict[tuple[str, int, int], list[torch.Tensor]] = {}

    @cached_property
    def questions(self) -> list[Question]:
        """Empty where the pair has only text."""
        if self.pair.questions is None:
            return []
        found = read_questions(Path(self.pair.questions))
        return found[: self.limits.questions] if self.limits.questions else found

    @cached_property
    def texts(self) -> list[Text]:
        """What errors and KL are measured on: the questions with their answers, or else held-out text."""
        if self.questions:
            found = [
                Text(self._ids(q.sample), len(self.tokenizer(q.prompt)["input_ids"])) for q in self.questions
            ]
        else:
            assert self.pair.heldout is not None
            drawn = self._draw(self.pair.heldout, self.limits.samples, 0)
            found = [Text(tokens, 1) for tokens in drawn if len(tokens) > 1]
        kept, left = [], self.limits.tokens
        for text in found:
            if len(text.tokens) <= left:
                kept.append(text)
                left -= len(text.tokens)
        if not kept:
            raise PrinMixError(
                "no text is short enough to measure on",
                where="--tokens",
                found=self.limits.tokens,
                expected=f"at least {min((len(t.tokens) for t in found), default=1)}",
            )
        return kept

    def samples(self, setting: Setting, seed: int) -> list[torch.Tensor]:
        """The calibration samples of one run: token ids; none where there is no data."""
        if setting.calibration == NONE:
            return []
        count = setting.samples or self.limits.samples
        if setting.calibration == WRITTEN:
            source: str | None = self._written(count, seed)
        else:
            source = self.pair.calibration_other if setting.calibration == OTHER else self.pair.calibration
        assert source is not None
        key = source, count, seed
        if key not in self._samples:
            self._samples[key] = self._draw(*key)
        return self._samples[key]

    def _written(self, count: int, seed: int) -> str:
        """A file of texts by the fine-tune itself, as `prinmix calibration` makes it."""
        out = Path(self._folder.name) / f"{count}-{seed}.jsonl"
        if not out.exists():
            write_calibration(
                str(self.finetuned.folder),
                out,
                samples=count,
                tokens=WRITTEN_TOKENS,
                seed=seed,
                device=self.limits.device.type,
                overwrite=False,
            )
        return str(out)

    def key(self, setting: Setting, seed: int, code: str) -> dict[str, Any]:
        """All that a run's result depends on, but for the machine."""
        limits = self.limits
        return {
            "base": self._digests[0],
            "finetuned": self._digests[1],
            "method": setting.method,
            "options": setting.compressor().options(),
            "ratio": str(setting.ratio),
            "distill": setting.distill,
            "budget": setting.budget if setting.shares(setting.compressor()) else "module",
            "compensated": setting.compensates(setting.compressor()),
            "embedding_ratio": str(limits.embedding_ratio),
            "calibration": _sha256(self.samples(setting, seed)),
            "texts": _sha256([text.tokens for text in self.texts]),
            "questions": len(self.questions) if limits.exact_match else 0,
            "device": limits.device.type,
            "code": code,
        }

    @cached_property
    def changed(self) -> set[str]:
        """Names of all tensors that differ between base and fine-tune."""
        return {
            name
            for name in self.kinds
            if not torch.equal(self.base.load(name).float(), self.finetuned.load(name).float())
        }

    def change(self, name: str) -> torch.Tensor:
        """dW, float32 [rows, cols]."""
        change = self.finetuned.load(name, torch.float32).to(self.limits.device)
        return change.sub_(self.base.load(name).to(self.limits.device))

    def is_exact(self, name: str) -> bool:
        """Whether a tensor is kept as it is, not quantized."""
        kind = self.kinds[name]
        return kind is Kind.EXACT or (kind is not Kind.LINEAR and self.limits.embedding_ratio is None)

    @cached_property
    def matrices(self) -> list[str]:
        """What is to be compressed, in the model's order."""
        return [name for name in self.kinds if name in self.changed and not self.is_exact(name)]

    def limit(self, setting: Setting, name: str) -> int | None:
        """The most bytes of one matrix; None: what the method takes, or whatever there is."""
        ratio = setting.ratio if self.kinds[name] is Kind.LINEAR else self.limits.embedding_ratio
        rows, cols = self.shapes[name]
        return None if ratio is None else budget(ratio, rows, cols)

    def unreachable(self, setting: Setting, compressor: Compressor) -> str | None:
        """Why the ratio cannot be kept to, or None."""
        if setting.ratio is None:
            return None
        if compressor.has_own_size:
            return "its size does not depend on the ratio"
        linears = {n: (s[0], s[1]) for n, s in self.shapes.items() if self.kinds[n] is Kind.LINEAR}
        try:
            check_reachable("--ratio", linears, setting.ratio, compressor)  # type: ignore[arg-type]
        except PrinMixError as error:
            return f"{error.what}; found: {error.found}; expected: {error.expected}"
        return None

    @cached_property
    def _digests(self) -> tuple[str, str]:
        return sample_digest(self.base), sample_digest(self.finetuned)

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text)["input_ids"], dtype=torch.int64)

    def _draw(self, source: str, samples: int, seed: int) -> list[torch.Tensor]:
        return calibration.draw(
            source,
            self.tokenizer,
            self.model.config.vocab_size,
            samples=samples,
            sequence_length=self.limits.sequence_length,
            seed=seed,
        ).tokens


def batches(texts: list[Text]) -> list[Batch]:
    """Texts of equal length together, so that none is padded."""
    alike: dict[int, list[Text]] = defaultdict(list)
    for text in texts:
        alike[len(text.tokens)].append(text)
    found = []
    for length, group in sorted(alike.items()):
        step = max(1, BATCH_TOKENS // length)
        for start in range(0, len(group), step):
            part = group[start : start + step]
            counts = torch.zeros(len(part), length - 1, dtype=torch.bool)
            for row, text in zip(counts, part, strict=True):
                row[text.answer - 1 :] = True
            found.append(Batch(torch.stack([text.tokens for text in part]), counts))
    return found


def _sha256(tokens: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for sample in tokens:
        digest.update(len(sample).to_bytes(8, "little"))
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]

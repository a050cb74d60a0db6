"""Training the scales: the student is base + delta, the teacher the fine-tune, and only scales change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.compress.pairs import Pair
from vllm_prinmix.compress import inspection
from vllm_prinmix.compress.calibration import NONE, draw, load_tokenizer
from vllm_prinmix.compress.distillation import train as training
from vllm_prinmix.compress.distillation.student import Student
from vllm_prinmix.compress.distillation.teacher import Teacher
from vllm_prinmix.compress.merge import merged_tensor
from vllm_prinmix.compress.methods.bitdelta import BitDelta
from vllm_prinmix.compress.model import build_model, read_architecture
from vllm_prinmix.compress.verify import verify
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.format.delta import Delta, read_delta
from vllm_prinmix.format.payload import decode
from vllm_prinmix.format.schema import Exact
from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix

CPU = torch.device("cpu")
STEPS = 20


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Case:
    """A pair, a delta of it made with few bytes, and its calibration samples."""

    def __init__(self, pair: Pair, delta: Path) -> None:
        self.base, self.finetuned = Checkpoint(str(pair.base)), Checkpoint(str(pair.finetuned))
        self.delta: Delta = read_delta(delta)
        self.config = read_architecture(self.finetuned)
        tokenizer = load_tokenizer(self.finetuned, self.base)
        drawn = draw(
            str(pair.calibration), tokenizer, self.config.vocab_size, samples=8, sequence_length=64, seed=0
        )
        self.samples = drawn.tokens

    def student(self) -> Student:
        matrices, exact = {}, {}
        for name, spec in self.delta.config.modules.items():
            if isinstance(spec, Exact):
                exact[name] = self.delta.tensors[name]
            else:
                matrices[name] = decode(spec, self.delta.tensors[name])
        return Student(build_model(self.config), self.base, matrices, exact, CPU)

    def teacher(self) -> Teacher:
        return Teacher(build_model(self.config), self.finetuned, self.samples, CPU, lambda text: None)


@pytest.fixture
def make_case(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> Callable[..., Case]:
    def make(method: Any = None, **settings: Any) -> Case:
        pair = make_pair(**settings)
        chosen = {} if method is None else {"method": method, "ratio": None}
        compress(pair, tmp_path / "delta", **chosen)
        return Case(pair, tmp_path / "delta")

    return make


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", [None, BitDelta()], ids=["factors", "matrix"])
def test_student_is_base_and_delta(make_case: Callable[..., Case], tied: bool, method: Any) -> None:
    case = make_case(method, tie_word_embeddings=tied)
    model = load(case.base.folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(merged_tensor(case.base, case.delta, name))
        expected = model(case.samples[0][None]).logits
    found = case.student().logits(case.samples[0][None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_teacher_is_the_finetune(make_case: Callable[..., Case], tied: bool) -> None:
    case = make_case(tie_word_embeddings=tied)
    teacher, model = case.teacher(), load(case.finetuned.folder)
    for i, sample in enumerate(case.samples):
        with torch.no_grad():
            expected = model(sample[None]).logits[0]
        torch.testing.assert_close(teacher.logits(i), expected, rtol=1e-4, atol=1e-4)


def test_divergence_of_a_padded_batch_is_the_sum_over_its_samples(make_case: Callable[..., Case]) -> None:
    case = make_case()
    student, teacher = case.student(), case.teacher()
    assert len({sample.numel() for sample in case.samples}) > 1
    together = training._divergence(student, teacher, case.samples, list(range(8)))
    total = 0.0
    for i, sample in enumerate(case.samples):
        p = torch.softmax(teacher.logits(i), dim=-1)
        q = torch.softmax(student.logits(sample[None])[0].detach(), dim=-1)
        total += float((p * (p / q).log()).sum())
    assert together.item() == pytest.approx(total, rel=1e-3)


def test_only_scales_change_and_the_divergence_falls(make_case: Callable[..., Case]) -> None:
    case = make_case()
    student, before = case.student(), case.student().results()
    result = training.train(student, case.teacher(), case.samples, STEPS, 0, lambda text: None)
    assert result.steps > 0
    assert result.after < result.before
    changed = 0
    for name, trained in result.changes.items():
        for field, value in vars(trained).items():
            if field == "scale":
                changed += int((value != before[name].scale).sum())
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(before[name], field)), (name, field)
    assert changed
    again = training.train(case.student(), case.teacher(), case.samples, STEPS, 0, lambda text: None)
    assert all(torch.equal(again.changes[n].scale, t.scale) for n, t in result.changes.items())


def test_wrong_scales_are_mended(make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LEARNING_RATE", 0.03)
    case = make_case()
    student = case.student()
    for change in student.changes.values():
        change.quantized = replace(change.quantized, scale=0.7 * change.quantized.scale)
    result = training.train(student, case.teacher(), case.samples, 60, 0, lambda text: None)
    assert result.after < 0.3 * result.before


def test_what_does_not_help_is_not_kept(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LEARNING_RATE", 100.0)
    case = make_case()
    before = case.student().results()
    result = training.train(case.student(), case.teacher(), case.samples, STEPS, 0, lambda text: None)
    assert (result.steps, result.after) == (0, result.before)
    assert all(torch.equal(result.changes[n].scale, t.scale) for n, t in before.items())


def test_bitdelta_keeps_one_scale_per_matrix(make_case: Callable[..., Case]) -> None:
    case = make_case(BitDelta())
    result = training.train(case.student(), case.teacher(), case.samples, STEPS, 0, lambda text: None)
    assert result.after < result.before
    matrices = [m for m in result.changes.values() if isinstance(m, QuantizedMatrix)]
    assert matrices
    assert all(bool((m.scale == m.scale[0]).all()) for m in matrices)


@pytest.mark.parametrize("tied", [False, True])
def test_compress_distilled(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    console: Console,
    tmp_path: Path,
    tied: bool,
) -> None:
    """The same bytes, other scales; `verify` finds the recorded errors."""
    pair = make_pair(tie_word_embeddings=tied)
    plain, trained = tmp_path / "plain", tmp_path / "trained"
    compress(pair, plain)
    compress(pair, trained, distill=STEPS)
    before, after = read_delta(plain), read_delta(trained)
    sizes = [{name: t.numel() for name, t in delta.tensors.items()} for delta in (before, after)]
    assert sizes[0] == sizes[1]
    assert before.config.distillation is None
    recorded = after.config.distillation
    assert recorded is not None
    assert recorded.steps == STEPS
    assert recorded.best_step > 0
    assert recorded.kl_after < recorded.kl_before
    factors = {n for n, spec in after.config.modules.items() if not isinstance(spec, Exact)}
    assert any(not torch.equal(before.tensors[n], after.tensors[n]) for n in factors)
    for name in factors:
        spec = after.config.modules[name]
        assert not isinstance(spec, Exact)
        assert isinstance(decode(spec, after.tensors[name]), QuantizedFactors)
    verify(trained, str(pair.base), str(pair.finetuned), str(pair.calibration), console)
    inspection.show(inspection.describe(trained), console)
    assert "scales trained for 20 steps" in console.file.getvalue()  # type: ignore[attr-defined]


def test_interrupted_training_starts_over_from_the_finished_matrices(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pair, whole, cut = make_pair(), tmp_path / "whole", tmp_path / "cut"
    compress(pair, whole, distill=STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(Student, "results", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(pair, cut, distill=STEPS)
    assert "tensors are taken over" in compress(pair, cut, distill=STEPS)
    one, two = read_delta(whole), read_delta(cut)
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"distill": -1}, "--distill"),
        ({"distill": STEPS, "calibration": NONE}, "--distill"),
        ({"distill": STEPS, "samples": 1}, "--distill"),
    ],
)
def test_bad_input(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    changes: dict[str, Any],
    where: str,
) -> None:
    with pytest.raises(PrinMixError) as error:
        compress(make_pair(), tmp_path / "delta", **changes)
    assert where in str(error.value)
    assert not (tmp_path / "delta").exists()

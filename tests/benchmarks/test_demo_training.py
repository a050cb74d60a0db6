"""The demo's optimiser, batches, measure and cache, against plain references."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.demo import corpus, family, tasks
from benchmarks.demo.evaluate import exact_match
from benchmarks.demo.models import ARCHITECTURES, Shape, build_model
from benchmarks.demo.muon import COEFFICIENTS, Muon, orthogonalise
from benchmarks.demo.tokenizer import END, build_tokenizer
from benchmarks.demo.train import train_pair_family
from benchmarks.demo.training import IGNORED, Schedule, batch_loss, fit, question_batches, text_batches

TOKENIZER = build_tokenizer(positions=2048)
TINY = Shape(hidden=64, intermediate=128, layers=1, heads=1, kv_heads=1)
QUESTIONS = [tasks.Question([], "<|user|>abc", "xy"), tasks.Question([], "<|user|>a", "z")]


def train_tiny_family(folder: Path, seed: int = 0, learned: float | None = None) -> dict:
    return train_pair_family(
        folder,
        seed=seed,
        shape=TINY,
        base=Schedule(steps=3, batch=2, rate=1e-2, muon=True),
        finetunes={"reverse": Schedule(steps=3, batch=4, rate=1e-2, learned=learned)},
        questions=8,
        samples=8,
    )


def test_a_task_that_is_not_learned_is_trained_longer(tmp_path: Path) -> None:
    """With half as many steps more, and again; then it stays as it is."""
    easy = train_tiny_family(tmp_path / "easy", learned=100.0)["reverse"]
    hard = train_tiny_family(tmp_path / "hard", learned=1e-9)["reverse"]
    assert (easy["steps"], hard["steps"]) == (3, 7)
    assert hard["loss"] < easy["loss"]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_is_encoded_and_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 16)])
def test_orthogonalise_applies_the_polynomial_to_the_singular_values(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, sigma, vh = torch.linalg.svd(matrices, full_matrices=False)
    sigma = sigma / sigma.norm(dim=1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    torch.testing.assert_close(orthogonalise(matrices), u * sigma[:, None] @ vh, atol=1e-5, rtol=1e-5)


def test_muon_steps_as_torch_muon_does() -> None:
    """torch.optim.Muon computes in bfloat16, hence the tolerance: 3 % of the way gone."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((16, 16), (32, 16), (16, 32), (16, 16))]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    own = Muon(ours, lr=0.1)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        own.step()
        reference.step()
    for before, mine, other in zip(start, ours, theirs, strict=True):
        assert (mine - other).norm() < 0.03 * (other - before).norm()


def test_the_learning_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(steps=100, batch=1, rate=2.0)
    rates = [schedule.rate_at(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5:41] == [2.0] * 36
    assert rates[70] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(2 / 60)


def test_only_the_answer_and_its_end_count() -> None:
    tokens, labels = next(question_batches(iter(QUESTIONS), TOKENIZER, 2))
    assert TOKENIZER.batch_decode(tokens) == [f"<|user|>abcxy{END}", f"<|user|>az{END}" + 3 * "<|pad|>"]
    assert TOKENIZER.batch_decode([row[row != IGNORED] for row in labels]) == [f"xy{END}", f"z{END}"]


def test_padding_changes_no_loss() -> None:
    model = build_model(TINY, TOKENIZER, seed=0).eval()
    together = batch_loss(model, next(question_batches(iter(QUESTIONS), TOKENIZER, 2)), torch.float32)
    first, second = (
        batch_loss(model, next(question_batches(iter([q]), TOKENIZER, 1)), torch.float32) for q in QUESTIONS
    )
    torch.testing.assert_close(together, (3 * first + 2 * second) / 5)


def test_windows_of_a_batch_are_cut_to_one_length() -> None:
    tokens, labels = next(text_batches([["abcä", "äöüß", "abcd"]], TOKENIZER))
    assert tokens.shape == (3, 4)
    assert torch.equal(tokens, labels)


def test_fit_learns_and_exact_match_counts_what_was_learned() -> None:
    drawn = tasks.draw_distinct("reverse", "training", 0, TOKENIZER, 8)
    learned, unknown = drawn[:4], drawn[4:]
    model = build_model(TINY, TOKENIZER, seed=0)
    batches = question_batches(cycle(learned), TOKENIZER, 4)
    fit(model, batches, Schedule(steps=80, batch=4, rate=1e-2), torch.float32)
    assert exact_match(model, learned, tokenizer=TOKENIZER) == 1.0
    assert exact_match(model, drawn, tokenizer=TOKENIZER) == 0.5
    # Whoever goes on after the right letters is wrong.
    short = [tasks.Question(q.messages, q.prompt, q.answer[:-1]) for q in learned]
    assert exact_match(model, short + unknown, tokenizer=TOKENIZER) == 0.0


def test_bfloat16_trains_float32_weights() -> None:
    model = build_model(TINY, TOKENIZER, seed=0)
    batches = question_batches(tasks.draw("reverse", "training", 0, TOKENIZER), TOKENIZER, 4)
    trained = fit(model, batches, Schedule(steps=20, batch=4, rate=1e-2, muon=True), torch.bfloat16)
    assert trained.loss < 4.5  # an untrained model is at log(264) = 5.6
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_output_is_finite_far_beyond_the_training_length(architecture: str) -> None:
    shape = Shape(architecture, hidden=64, intermediate=128, layers=1, heads=1, kv_heads=1)
    model = build_model(shape, TOKENIZER, seed=0)
    windows = corpus.windows(corpus.standard_library(), 64, 2, Random(0))
    fit(model, text_batches(windows, TOKENIZER), Schedule(5, 2, 1e-2, muon=True), torch.float32)
    with torch.no_grad():
        assert model(torch.arange(1500)[None] % 256).logits.isfinite().all()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("second", 0), ("other", 1)):
        train_tiny_family(tmp_path / name, seed)
    for path in ("base/model.safetensors", "reverse/model.safetensors", "test/reverse.jsonl"):
        first, second, other = ((tmp_path / n / path).read_bytes() for n in ("first", "second", "other"))
        assert first == second != other


def test_other_settings_replace_what_is_there(tmp_path: Path) -> None:
    train_tiny_family(tmp_path / "models")
    (tmp_path / "models" / "mark").touch()
    train_tiny_family(tmp_path / "models", seed=1)
    assert not (tmp_path / "models" / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_training_cut_short_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(family, "mean_change", interrupted)  # called after the fine-tune was saved
    with pytest.raises(KeyboardInterrupt):
        train_tiny_family(tmp_path / "models")
    assert list(tmp_path.iterdir()) == []

"""Layers fitted to what the compressed layers before them give, against whole models run side by side."""

from __future__ import annotations

import string
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compress.pairs import VOCABULARY, Pair
from tests.compress.test_resume import contents, interrupt
from vllm_prinmix.compress import corrections
from vllm_prinmix.compress.compensation import Fit, fits
from vllm_prinmix.compress.corrections import Sums
from vllm_prinmix.compress.inspection import describe
from vllm_prinmix.compress.merge import merge
from vllm_prinmix.compress.methods.delta_come import DeltaCome
from vllm_prinmix.compress.methods.paper import Paper
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.metrics import hessians
from vllm_prinmix.compress.model import Kind, build_model, expected_tensors, is_tied, read_architecture
from vllm_prinmix.compress.quantization.hessian import DAMPING
from vllm_prinmix.compress.verify import verify
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint

CPU = torch.device("cpu")
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"architecture": "qwen2"},
    "qwen3 tied": {"architecture": "qwen3", "tie_word_embeddings": True},
    "llama": {"architecture": "llama"},
    "mistral sliding": {"architecture": "mistral", "sliding_window": 6},
}


def some_samples() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (n,), generator=random) for n in (120, 90, 1, 200)]


class Models:
    """The fine-tune and the compressed model, whole; weights of the latter are put in one by one."""

    def __init__(self, pair: Pair) -> None:
        from transformers import AutoModelForCausalLM

        self.base, self.finetuned = Checkpoint(pair.base), Checkpoint(pair.finetuned)
        self.meta = build_model(read_architecture(self.finetuned))
        self.tied = is_tied(self.meta)
        self.ours, self.theirs = (
            AutoModelForCausalLM.from_pretrained(pair.finetuned, dtype=torch.float32).eval() for _ in range(2)
        )
        self.matrices = [
            name for name, (kind, _) in expected_tensors(self.meta).items() if kind is not Kind.EXACT
        ]
        random = torch.Generator().manual_seed(1)
        self.changes = {}  # dW^, dW with errors of 10 %
        for name in self.matrices:
            dw = self.finetuned.difference(self.base, name)
            noise = torch.randn(dw.shape, generator=random)
            self.changes[name] = dw + 0.1 * noise * dw.norm() / noise.norm()

    def put(self, name: str) -> None:
        """The compressed weight."""
        weight = self.base.load(name, torch.float32) + self.changes[name]
        self.theirs.get_parameter(name).data.copy_(weight)

    def expected(self, name: str, samples: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """H and C of the linear ``name`` by their formulas, float64, from whole models as they are now."""
        metric, missed = self._sums(name, samples)
        halves = [self._sums(name, samples[i::2]) for i in range(2)]
        explained = size = 0.0
        for (h, m), (other_h, other_m) in (halves, halves[::-1]):
            found = solve(h, m)
            explained += float((other_m * found).sum())
            size += float((found @ other_h * found).sum())
        return metric, solve(metric, missed) * (min(max(explained / size, 0.0), 1.0) if size else 0.0)

    @torch.no_grad()
    def _sums(self, name: str, samples: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (
            self._seen(model, name.removesuffix(".weight"), samples) for model in (self.ours, self.theirs)
        )
        missed = self.finetuned.load(name, torch.float32).double() @ (x - y).T @ y
        layer, _, module = name.removesuffix(".weight").rpartition(".")
        norms = {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}
        if module in norms:
            norm = f"{layer.rpartition('.')[0]}.{norms[module]}"
            ours, theirs = (self._seen(model, norm, samples) for model in (self.ours, self.theirs))
            missed += (ours - theirs).T @ y
        return y.T @ y, missed

    def _seen(self, model: Any, module: str, samples: list[torch.Tensor]) -> torch.Tensor:
        """float64 [tokens, width] that a module reads."""
        seen = []
        hook = model.get_submodule(module).register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
        for sample in samples:
            model(sample[None])
        hook.remove()
        return torch.cat(seen).double()


def solve(metric: torch.Tensor, missed: torch.Tensor) -> torch.Tensor:
    damped = metric + DAMPING * metric.diagonal().mean() * torch.eye(len(metric))
    return torch.linalg.solve(damped, missed.T).T


@pytest.mark.parametrize("case", CASES)
def test_equals_the_formulas_on_whole_models(
    make_pair: Callable[..., Pair], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corrections, "CHUNK", 50)
    models, samples = Models(make_pair(**CASES[case])), some_samples()
    left, wanted = set(models.matrices), set(models.matrices)
    if models.tied:
        wanted.remove(EMBEDDING)  # comes last, see below
    order: list[list[Fit]] = []

    def change(name: str) -> torch.Tensor | None:
        return models.changes[name]

    groups = fits(models.meta, models.base, models.finetuned, samples, wanted, CPU, change)
    for group in groups:
        order.append(group)
        for fit in group:
            if fit.name == EMBEDDING:
                assert fit.correction is None
                continue
            metric, correction = models.expected(fit.name, samples)
            assert torch.allclose(fit.hessian.matrix.double(), metric, rtol=1e-3, atol=1e-4 * metric.max())
            found = torch.zeros_like(correction) if fit.correction is None else fit.correction.double()
            assert (found - correction).norm() <= 1e-3 * correction.norm() + 1e-9
        for fit in group:
            models.put(fit.name)
            left.remove(fit.name)
    assert left == ({EMBEDDING} if models.tied else set())
    per_layer = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    ends = [[{"embed_tokens"}], [{"lm_head"}]] if not models.tied else [[], []]
    found_order = [{fit.name.removesuffix(".weight").rpartition(".")[2] for fit in group} for group in order]
    assert found_order == [*ends[0], *per_layer, *per_layer, *ends[1]]


@pytest.mark.parametrize("writer", [False, True])
def test_some_rows_of_what_is_missed(writer: bool) -> None:
    random = torch.Generator().manual_seed(0)
    weight, r = (torch.randn(6, n, generator=random) for n in (4, 9))
    x, y = torch.randn(2, 9, 4, generator=random)
    sums = Sums(y, weight if writer else None)
    for part in (slice(0, 5), slice(5, 9)):
        sums.add(x[part], y[part], r.T[part] if writer else None)
    expected = weight @ (x - y).T @ y + (r @ y if writer else 0)
    for rows in (torch.tensor([4, 1]), slice(2, 4), slice(None)):
        assert torch.allclose(sums.target(weight, rows), expected[rows], atol=1e-5)


def test_a_tied_embedding_comes_last_as_without(make_pair: Callable[..., Pair]) -> None:
    models, samples = Models(make_pair(tie_word_embeddings=True)), some_samples()
    arguments = models.finetuned, samples, {EMBEDDING}, CPU
    (group,) = fits(models.meta, models.base, *arguments, models.changes.get)
    ((name, hessian),) = hessians(models.meta, *arguments)
    assert (group[0].name, group[0].correction) == (name, None)
    assert torch.equal(group[0].hessian.matrix, hessian.matrix)


@pytest.mark.parametrize("tied", [False, True])
def test_without_errors_nothing_is_corrected(make_pair: Callable[..., Pair], tied: bool) -> None:
    """float32 checkpoints of weights that bfloat16 holds: base + dW is the fine-tune, bit for bit."""
    pair = make_pair(tie_word_embeddings=tied)
    models, samples = Models(pair), some_samples()

    def exact(name: str) -> torch.Tensor | None:
        return models.finetuned.difference(models.base, name)

    plain = dict(hessians(models.meta, models.finetuned, samples, set(models.matrices), CPU))
    groups = fits(models.meta, models.base, models.finetuned, samples, set(models.matrices), CPU, exact)
    for fit in (fit for group in groups for fit in group):
        close = {"rtol": 1e-4, "atol": 1e-5 * float(plain[fit.name].matrix.abs().max())}
        assert torch.allclose(fit.hessian.matrix, plain[fit.name].matrix, **close)
        if fit.correction is not None:
            assert fit.correction.norm() < 1e-4 * models.finetuned.load(fit.name, torch.float32).norm()


def test_only_what_is_wanted_is_run(make_pair: Callable[..., Pair]) -> None:
    """What an interrupted run has finished is put in; nothing is run past the last wanted matrix."""
    models, samples, asked = Models(make_pair()), some_samples(), []

    def change(name: str) -> torch.Tensor | None:
        asked.append(name)
        return models.changes[name]

    wanted = {"model.layers.0.mlp.up_proj.weight"}
    ((fit,),) = fits(models.meta, models.base, models.finetuned, samples, wanted, CPU, change)
    attention = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"]
    for name in [EMBEDDING, *attention]:
        models.put(name)
    _, correction = models.expected(fit.name, samples)
    assert fit.correction is not None
    assert (fit.correction - correction).norm() <= 1e-3 * correction.norm()
    assert asked[:5] == [EMBEDDING, *attention]
    assert not any("layers.1" in name for name in asked)


@torch.no_grad()
def divergence(pair: Pair, delta: Path, tmp_path: Path) -> float:
    """KL(fine-tune || compressed) on fresh texts of letters and digits, nats per token."""
    from rich.console import Console
    from transformers import AutoModelForCausalLM

    merged = tmp_path / f"{delta.name}-merged"
    merge(str(pair.base), delta, merged, "float32", False, Console(quiet=True))
    tokens = torch.randint(3, 65, (64, 30), generator=torch.Generator().manual_seed(5))  # letters, digits
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(tokens).logits.log_softmax(-1)
        for f in (pair.finetuned, merged)
    )
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


@pytest.mark.parametrize("method", [PrinMix(alternations=0), Paper(solver="exact")], ids=str)
@pytest.mark.parametrize("lines", [8, 256])
def test_predictions_come_nearer_at_the_same_bytes(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    method: Any,
    lines: int,
) -> None:
    """With fewer tokens than it takes (8 lines) nothing is gained, and on other texts nothing lost."""
    pair, found = make_pair(), {}
    random = torch.Generator().manual_seed(3)
    letters = torch.randint(0, 60, (lines, 30), generator=random).tolist()
    alphabet = string.ascii_letters + string.digits
    pair.calibration.write_text("\n".join("".join(alphabet[i] for i in line) for line in letters))
    for compensate in (False, True):
        out = tmp_path / f"delta-{compensate}"
        settings = {"method": method, "compensate": compensate, "samples": lines}
        compress(pair, out, ratio=Fraction(1, 16), **settings)
        assert describe(out)["settings"]["compensated"] is compensate
        found[compensate] = divergence(pair, out, tmp_path)
    assert found[True] < (0.85 if lines > 8 else 1.1) * found[False]


def test_by_default_prinmix_does_and_the_others_do_not(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair, quick = make_pair(), PrinMix(alternations=0, clipping=False)
    for name, method, calibration, expected in (
        ("ours", quick, str(pair.calibration), True),
        ("paper", Paper(solver="exact"), str(pair.calibration), False),
        ("no-data", quick, "none", False),
    ):
        compress(pair, tmp_path / name, method=method, calibration=calibration)
        assert describe(tmp_path / name)["settings"]["compensated"] is expected


def test_errors_are_measured_again_as_they_were(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, console: Any
) -> None:
    pair = make_pair()
    method = PrinMix(alternations=0, clipping=False)
    compress(pair, tmp_path / "delta", method=method, ratio=Fraction(1, 16))
    entries = verify(tmp_path / "delta", str(pair.base), str(pair.finetuned), str(pair.calibration), console)
    recorded = {m["name"]: m["report"]["error"] for m in describe(tmp_path / "delta")["modules"]}
    measured = {entry["name"]: entry["error"] for entry in entries if "error" in entry}
    assert HEAD in measured
    assert measured == pytest.approx({name: recorded[name] for name in measured}, rel=1e-2)


@pytest.mark.parametrize("after", [8, 11, 14])
def test_resumed_in_the_middle_of_a_group(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    pair = make_pair()
    settings = {"method": PrinMix(alternations=0, clipping=False), "ratio": Fraction(1, 16)}
    compress(pair, tmp_path / "whole", **settings)
    interrupt(monkeypatch, after)
    with pytest.raises(KeyboardInterrupt):
        compress(pair, tmp_path / "parts", **settings)
    compress(pair, tmp_path / "parts", **settings)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_scales_are_trained_on_top(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path, console: Any
) -> None:
    pair = make_pair()
    method = PrinMix(alternations=0, clipping=False)
    compress(pair, tmp_path / "delta", method=method, ratio=Fraction(1, 16), distill=3)
    settings = describe(tmp_path / "delta")
    assert settings["settings"]["compensated"]
    assert settings["distillation"]["steps"] == 3
    verify(tmp_path / "delta", str(pair.base), str(pair.finetuned), str(pair.calibration), console)


def test_one_sample_has_no_halves(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair()
    settings = {"method": PrinMix(alternations=0, clipping=False), "samples": 1, "ratio": Fraction(1, 8)}
    compress(pair, tmp_path / "delta", **settings)
    assert not describe(tmp_path / "delta")["settings"]["compensated"]
    with pytest.raises(PrinMixError, match="1 calibration sample"):
        compress(pair, tmp_path / "other", compensate=True, **settings)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"calibration": "none", "method": PrinMix()}, "--calibration none"),
        ({"method": DeltaCome(delta_come_quirk=True)}, "--delta-come-quirk"),
    ],
)
def test_what_cannot_be(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    changes: dict[str, Any],
    found: str,
) -> None:
    with pytest.raises(PrinMixError, match=found) as error:
        compress(make_pair(), tmp_path / "delta", compensate=True, **changes)
    assert error.value.where == "--compensate"

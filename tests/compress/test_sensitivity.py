"""How much errors of each layer matter: layer by layer as the whole model's backward pass finds it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from tests.compress.pairs import VOCABULARY, Pair
from tests.compress.test_stream import CASES
from vllm_prinmix.compress import sensitivity
from vllm_prinmix.compress.model import Kind, build_model, expected_tensors, read_architecture
from vllm_prinmix.compress.sensitivity import importance, sensitivities
from vllm_prinmix.format.checkpoint import Checkpoint

CPU = torch.device("cpu")


def some_samples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in (40, 1, 17)]


def whole_model(checkpoint: Checkpoint, samples: list[torch.Tensor]) -> dict[str, float]:
    """`sensitivities` by one backward pass through transformers' own model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    found: dict[str, float] = {}

    def keep(name: str):
        def forward(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            def add(gradient: torch.Tensor) -> None:
                found[name] = found.get(name, 0.0) + float(gradient.square().mean(-1).sum())

            output.register_hook(add)

        return forward

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(keep(f"{name}.weight"))
    draw = torch.Generator().manual_seed(0)
    for sample in samples:
        logits = model(sample[None]).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return {name: total / sum(map(len, samples)) for name, total in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_layer_by_layer_equals_the_whole_model(make_pair: Callable[..., Pair], case: str) -> None:
    checkpoint, samples = Checkpoint(make_pair(**CASES[case]).finetuned), some_samples()
    model = build_model(read_architecture(checkpoint))
    found = sensitivities(model, checkpoint, samples, CPU)
    linear = {name for name, (kind, _) in expected_tensors(model).items() if kind is Kind.LINEAR}
    assert set(found) == linear
    assert found == pytest.approx(whole_model(checkpoint, samples), rel=1e-3)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_only_so_many_tokens_are_run(make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "WINDOW", 10)
    monkeypatch.setattr(sensitivity, "TOKENS", 24)
    checkpoint = Checkpoint(make_pair().finetuned)
    model = build_model(read_architecture(checkpoint))
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in (40, 12, 17, 5)]
    cut = [samples[0][:10], samples[1][:10], samples[2][:4]]
    found = sensitivities(model, checkpoint, samples, CPU)
    assert found == sensitivities(model, checkpoint, cut, CPU)


def test_it_foresees_what_small_errors_do_to_the_predictions(make_pair: Callable[..., Pair]) -> None:
    """KL = 1/2 sensitivity x squared error, for noise in one layer's outputs; within the chance of a draw."""
    from transformers import AutoModelForCausalLM

    checkpoint, samples = Checkpoint(make_pair().finetuned), some_samples()
    found = sensitivities(build_model(read_architecture(checkpoint)), checkpoint, samples, CPU)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float64).eval()
    noise, generator = 1e-3, torch.Generator().manual_seed(1)

    def disturb(
        module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        return output + noise * torch.randn(output.shape, generator=generator, dtype=torch.float64)

    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.v_proj"):
        kl, tokens = 0.0, 0
        with torch.no_grad():
            for sample in samples * 20:
                expected = model(sample[None]).logits[0].log_softmax(-1)
                handle = model.get_submodule(name).register_forward_hook(disturb)
                disturbed = model(sample[None]).logits[0].log_softmax(-1)
                handle.remove()
                kl += float(functional.kl_div(disturbed, expected, reduction="sum", log_target=True))
                tokens += len(sample)
        rows = model.get_submodule(name).out_features
        assert kl / tokens == pytest.approx(rows * noise**2 * found[f"{name}.weight"] / 2, rel=0.5)


def test_importance() -> None:
    """The root of sensitivity x energy; what seems to count for nothing counts a little."""
    energy = {"a": 4.0, "b": 9.0, "c": 5.0}
    found = importance({"a": 1.0, "b": 4.0, "c": 0.0}, energy)
    assert found == pytest.approx({"a": 2.0, "b": 6.0, "c": 0.01 * 8 / 3})
    assert importance({"a": 0.0}, {"a": 1.0}) == {"a": 1.0}

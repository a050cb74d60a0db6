"""Layer by layer must give what the whole model gives: every linear's X X^T, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.compress.pairs import VOCABULARY, Pair
from vllm_prinmix.compress import stream
from vllm_prinmix.compress.metrics import embedding_hessian, hessians, tied_hessian
from vllm_prinmix.compress.model import Kind, build_model, expected_tensors, read_architecture
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint

CPU = torch.device("cpu")

CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"architecture": "qwen2"},
    "qwen2 sliding": {
        "architecture": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
    },
    "qwen3 tied": {"architecture": "qwen3", "tie_word_embeddings": True},
    "llama": {"architecture": "llama"},
    "llama yarn": {
        "architecture": "llama",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral sliding": {"architecture": "mistral", "sliding_window": 6},
}


def whole_model(checkpoint: Checkpoint, samples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """X X^T of every linear's input from transformers' own forward of the whole model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    moments: dict[str, torch.Tensor] = {}

    def hook(name: str):
        def pre_forward(module: Any, args: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            moments[name] = moments.get(name, torch.zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)

        return pre_forward

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        for sample in samples:
            model(sample[None])
    return moments


@pytest.mark.parametrize("case", CASES)
def test_streaming_equals_the_whole_model(make_pair: Callable[..., Pair], case: str) -> None:
    checkpoint = Checkpoint(make_pair(**CASES[case]).finetuned)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, VOCABULARY, (n,), generator=generator) for n in (40, 1, 17)]
    reference = whole_model(checkpoint, samples)
    model = build_model(read_architecture(checkpoint))
    matrices = {name for name, (kind, _) in expected_tensors(model).items() if kind is not Kind.EXACT}
    found = {name: hessian.matrix for name, hessian in hessians(model, checkpoint, samples, matrices, CPU)}
    assert set(found) == matrices
    head = reference.pop(HEAD)
    if HEAD in matrices:
        assert torch.equal(found[HEAD], head)
        assert torch.equal(found[EMBEDDING], embedding_hessian(samples, VOCABULARY, CPU).matrix)
    else:
        assert torch.equal(found[EMBEDDING], tied_hessian(head).matrix)
    for name, matrix in reference.items():
        assert torch.equal(found[name], matrix), name
    assert all(parameter.is_meta for parameter in model.parameters())


def test_modules_with_one_input_share_one_metric(make_pair: Callable[..., Pair]) -> None:
    checkpoint = Checkpoint(make_pair().finetuned)
    model = build_model(read_architecture(checkpoint))
    hidden = stream.embed(checkpoint, [torch.arange(20)])
    wanted = {name for name in checkpoint.tensors if "layers.0." in name and name.endswith("_proj.weight")}
    moments = stream.run_layer(model, checkpoint, 0, hidden, wanted, CPU)
    sharing: dict[int, list[str]] = {}
    for name, matrix in moments.items():
        sharing.setdefault(id(matrix), []).append(name.split(".")[-2])
    assert list(sharing.values()) == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_no_forward_pass_without_need(
    make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(make_pair().finetuned)
    model = build_model(read_architecture(checkpoint))
    run, layers = stream.run_layer, []

    def counted(model: Any, checkpoint: Checkpoint, index: int, *args: Any) -> Any:
        layers.append(index)
        return run(model, checkpoint, index, *args)

    monkeypatch.setattr(stream, "run_layer", counted)

    def names(wanted: set[str]) -> list[str]:
        layers.clear()
        return [name for name, _ in hessians(model, checkpoint, [torch.arange(5)], wanted, CPU)]

    assert names({EMBEDDING}) == [EMBEDDING]
    assert layers == []
    assert names({"model.layers.0.mlp.up_proj.weight"}) == ["model.layers.0.mlp.up_proj.weight"]
    assert layers == [0]
    assert names({HEAD}) == [HEAD]
    assert layers == [0, 1]


def test_embedding_metric_counts_tokens_and_keeps_the_unseen() -> None:
    diagonal = embedding_hessian([torch.tensor([3, 1, 3]), torch.tensor([3])], 5, CPU).matrix
    assert torch.allclose(diagonal, torch.tensor([0.0, 1, 0, 3, 0]) + 0.01 * 4 / 5)


def test_tied_metric_weighs_both_uses_alike() -> None:
    head = torch.diag(torch.tensor([6.0, 3.0, 0.0]))
    assert torch.allclose(tied_hessian(head).matrix, torch.diag(torch.tensor([2 / 3, 1 / 3, 0]) + 1 / 3))


def test_wide_inputs_are_added_up_in_blocks() -> None:
    """Half of a symmetric matrix is computed, the other half mirrored."""
    random = torch.Generator().manual_seed(0)
    samples = [torch.randn(1, 7, 2 * stream.BLOCK + 100, generator=random) for _ in range(2)]
    moments = stream._SecondMoments()
    for sample in samples:
        moments.hook("wide")(torch.nn.Identity(), (sample,))
        moments.end_sample()
    x = torch.cat(samples, dim=1)[0]
    assert torch.allclose(moments.finish()["wide"], x.T @ x, rtol=1e-5, atol=1e-4)


def test_other_products_keep_their_precision(make_pair: Callable[..., Pair]) -> None:
    """TF32 is for the calibration's forward passes alone, also where they fail."""
    pair, seen = make_pair(), []
    checkpoint = Checkpoint(pair.finetuned)
    model = build_model(read_architecture(checkpoint))
    norm = model.model.layers[0].input_layernorm
    allowed = torch.backends.cuda.matmul
    norm.register_forward_pre_hook(lambda *_: seen.append(allowed.allow_tf32))
    hidden = stream.embed(checkpoint, [torch.arange(5)])
    stream.run_layer(model, checkpoint, 0, hidden, set(), CPU)
    norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream.run_layer(model, checkpoint, 0, hidden, set(), CPU)
    assert seen == [True, True]
    assert not allowed.allow_tf32

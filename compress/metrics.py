"""The metric H of every matrix of a model: from calibration, in a forward pass's order, or without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_prinmix.compress import stream
from vllm_prinmix.compress.model import expected_tensors, is_tied, layer_prefix
from vllm_prinmix.compress.quantization.hessian import DAMPING, Hessian
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint

# The weight of inputs in the data-free metric wherever they lie, over the mean of what dW says of them. From
# 0.1 to 0.3 the pairs hardly differ; at 1 the one with a flat spectrum has twice the KL.
SPREAD = 0.3
# What layers need is known well enough for sharing bytes from fewer samples than they are compressed with:
# so many tokens for each input of the widest.
TOKENS_PER_INPUT = 4


def enough(samples: list[torch.Tensor], inputs: int) -> list[torch.Tensor]:
    """The first of ``samples`` with TOKENS_PER_INPUT tokens for each of ``inputs``, or all there are."""
    wanted, tokens = TOKENS_PER_INPUT * inputs, 0
    for count, sample in enumerate(samples, 1):
        tokens += len(sample)
        if tokens >= wanted:
            return samples[:count]
    return samples


def hessians(
    model: Any,
    checkpoint: Checkpoint,
    samples: list[torch.Tensor],
    wanted: set[str],
    device: torch.device,
    tell: Callable[[str], None] = lambda text: None,
    repeats: int = 0,
) -> Iterator[tuple[str, Hessian]]:
    """(weight name, metric of its inputs) for all ``wanted`` matrices: embedding, layers, lm_head.

    ``model`` is on the meta device, ``samples`` are int64 token ids [tokens]. One decoder layer and its
    metrics are in memory at a time; modules that share an input follow one another with the same `Hessian`.
    An untied embedding's metric is that of its transpose [hidden, vocabulary], see `embedding_hessian`.
    ``tell`` hears which layer's samples are being run. No forward pass is made that no wanted matrix needs.

    With ``repeats`` the linear layers' metrics have as many others, `repeated`: of the samples carried along
    once more, through every layer so many times before the next. In memory they are a metric each too.
    """
    left = set(wanted)
    tied = is_tied(model)
    if EMBEDDING in left and not tied:
        yield EMBEDDING, embedding_hessian(samples, model.config.vocab_size, device)
        left.remove(EMBEDDING)
    if not left:
        return
    hidden = stream.embed(checkpoint, samples)
    drifting = list(hidden) if repeats else []
    for index in range(model.config.num_hidden_layers):
        tell(f"layer {index}: running the calibration samples")
        names = [name for name in wanted if name.startswith(layer_prefix(index))]
        moments = stream.run_layer(model, checkpoint, index, hidden, set(names), device)
        again = [
            stream.run_layer(model, checkpoint, index, drifting, set(names), device) for _ in range(repeats)
        ]
        matrix, hessian = None, None
        for name in list(moments):
            if hessian is None or moments[name] is not matrix:
                matrix = moments[name]
                hessian = Hessian(matrix)
                hessian.repeated = tuple(Hessian(other[name]) for other in again)
            del moments[name]
            for other in again:
                del other[name]
            yield name, hessian
        del matrix, hessian  # large, and not needed while the next layer runs
        left.difference_update(names)
        if not left:
            return
    head = stream.head_moments(model, checkpoint, hidden, device)
    hidden.clear()
    yield (EMBEDDING, tied_hessian(head)) if tied else (HEAD, Hessian(head))


def data_free(
    model: Any, base: Checkpoint, finetuned: Checkpoint, wanted: set[str], device: torch.device
) -> Iterator[tuple[str, Hessian]]:
    """`hessians` without data and forward passes: what the weights tell of the inputs.

    An RMS norm's outputs are of unit mean square before its weight w, so what reads them (q, k, v; gate, up;
    lm_head) has H_kk = w_k^2; all inputs of o and down weigh alike. Beyond that, dW is a sum of gradients
    d x^T over the inputs x that the fine-tune saw: with S = diag(w), dW S has its rows where x / w lay, so

        H = S (M / mean(diag M) + SPREAD I) S,    M = (dW S)^T (dW S).

    Embeddings have the diagonal S^2 alone, over tokens ones.
    """
    tied = is_tied(model)
    for name in expected_tensors(model):
        if name not in wanted:
            continue
        norm = _norm_before(name, tied)
        if norm is None:
            weights = torch.ones(_inputs(model, name, tied), device=device)
        else:
            weights = finetuned.load(norm, torch.float32).abs().to(device)
        if name != EMBEDDING:
            yield name, Hessian(_expected_moments(finetuned.difference(base, name).to(device), weights))
        else:
            yield name, tied_hessian(weights.square()) if tied else Hessian(weights)


def _expected_moments(dw: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """H of `data_free`, up to a factor, from dW [rows, cols] and w [cols]; float32 [cols, cols]."""
    scaled = dw * weights
    moments = scaled.T @ scaled
    mean = moments.diagonal().mean()
    if mean > 0:
        moments /= mean
    moments.diagonal().add_(SPREAD)
    return moments * weights[:, None] * weights


def _norm_before(name: str, tied: bool) -> str | None:
    """The weight of the norm whose outputs a matrix reads, if it reads one's."""
    layer, _, module = name.removesuffix(".weight").rpartition(".")
    if name == HEAD or (tied and name == EMBEDDING):
        return "model.norm.weight"
    if module in ("q_proj", "k_proj", "v_proj"):
        return layer.replace(".self_attn", ".input_layernorm.weight")
    if module in ("gate_proj", "up_proj"):
        return layer.replace(".mlp", ".post_attention_layernorm.weight")
    return None


def _inputs(model: Any, name: str, tied: bool) -> int:
    rows, cols = model.get_parameter(name).shape
    return rows if name == EMBEDDING and not tied else cols


def embedding_hessian(samples: list[torch.Tensor], vocabulary: int, device: torch.device) -> Hessian:
    """The diagonal metric [vocabulary] of dE^T [hidden, vocabulary], whose inputs are one-hot: token counts.

    A floor of DAMPING times their mean keeps the rows of tokens that calibration never saw in the fit.
    """
    counts = stream.token_counts(samples, vocabulary)
    return Hessian((counts + DAMPING * counts.mean()).to(device))


def tied_hessian(head: torch.Tensor) -> Hessian:
    """The metric [hidden, hidden] of an embedding that is lm_head too; both uses count the same.

    ``head`` is X X^T of lm_head's inputs, or its diagonal, here scaled to trace 1. The look-up weighs all
    columns alike.
    """
    width = head.shape[0]
    if head.dim() == 1:
        return Hessian(head / head.sum() + 1 / width)
    return Hessian(head / head.trace() + torch.eye(width, device=head.device) / width)

"""The metric H of every matrix of a model: from calibration, in a forward pass's order, or without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_prinmix.compress import stream
from vllm_prinmix.compress.model import expected_tensors, is_tied, layer_prefix
from vllm_prinmix.compress.quantization.hessian import DAMPING, Hessian
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint


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
    model: Any, checkpoint: Checkpoint, wanted: set[str], device: torch.device
) -> Iterator[tuple[str, Hessian]]:
    """`hessians` without data and forward passes: diagonals from the weights of the norms.

    An RMS norm's outputs are of unit mean square before its weight w, so what reads them (q, k, v; gate, up;
    lm_head) has H_kk = w_k^2. All other inputs weigh alike: o, down, and the tokens of an embedding.
    """
    tied = is_tied(model)
    for name in expected_tensors(model):
        if name not in wanted:
            continue
        norm = _norm_before(name, tied)
        if norm is None:
            weights = torch.ones(_inputs(model, name, tied))
        else:
            weights = checkpoint.load(norm, torch.float32).square()
        weights = weights.to(device)
        yield name, tied_hessian(weights) if tied and name == EMBEDDING else Hessian(weights)


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

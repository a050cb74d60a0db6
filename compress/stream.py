"""Calibration activations, one decoder layer in memory at a time.

The samples' hidden states are carried from layer to layer. A layer is run by the model's own forward with
all other layers taken out, so that masks, rotary tables and sliding windows are the model's own too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from vllm_prinmix.compress.model import layer_prefix
from vllm_prinmix.format.checkpoint import EMBEDDING, Checkpoint

BLOCK = 512  # columns of X X^T that are computed at once


def embed(checkpoint: Checkpoint, samples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """int64 token ids [tokens] or [samples, tokens] -> float32 hidden states [samples, tokens, hidden]."""
    table = checkpoint.load(EMBEDDING)
    return [table[torch.atleast_2d(ids)].float() for ids in samples]


def token_counts(samples: Sequence[torch.Tensor], vocabulary: int) -> torch.Tensor:
    """float32 [vocabulary]: how often each token occurs, the diagonal of the embedding's own X X^T."""
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for sample in samples:
        counts += torch.bincount(sample, minlength=vocabulary)
    return counts.float()


@contextmanager
def calibrating() -> Iterator[None]:
    """No gradients, and on a GPU products of TF32, many times faster: what weights of 16 bits are run on.

    A metric stays positive semi-definite: both factors of X X^T are rounded alike.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@calibrating()
def run_layer(
    model: Any,
    checkpoint: Checkpoint,
    index: int,
    hidden: list[torch.Tensor],
    wanted: set[str],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Take ``hidden`` through decoder layer ``index`` in place; return X X^T of the wanted linears' inputs.

    ``model`` is on the meta device (`build_model`) and is so again afterwards. ``wanted`` has weight names
    such as ``model.layers.0.mlp.down_proj.weight``. The result is float32 [cols, cols] per name, on
    ``device``; modules with the same input (q, k, v; gate, up) share one tensor.
    """
    prefix = layer_prefix(index)
    with one_layer(model, checkpoint, index, device) as layer:
        moments = _SecondMoments()
        hooks = [
            module.register_forward_pre_hook(moments.hook(f"{prefix}{name}.weight"))
            for name, module in layer.named_modules()
            if f"{prefix}{name}.weight" in wanted
        ]
        for i, states in enumerate(hidden):
            hidden[i] = model.model(inputs_embeds=states.to(device), use_cache=False).last_hidden_state.cpu()
            moments.end_sample()
        for hook in hooks:
            hook.remove()
    return moments.finish()


@torch.no_grad()
def final_norm(
    model: Any, checkpoint: Checkpoint, hidden: list[torch.Tensor], device: torch.device
) -> Iterator[torch.Tensor]:
    """lm_head's inputs from the last layer's outputs: float32 [1, tokens, hidden] on ``device`` each."""
    with one_norm(model, checkpoint, device) as norm:
        for states in hidden:
            yield norm(states.to(device))


def head_moments(
    model: Any, checkpoint: Checkpoint, hidden: list[torch.Tensor], device: torch.device
) -> torch.Tensor:
    """float32 [hidden, hidden]: X X^T of lm_head's inputs, from the last layer's outputs."""
    width = hidden[0].shape[-1]
    moments = torch.zeros(width, width, device=device)
    for states in final_norm(model, checkpoint, hidden, device):
        x = states.reshape(-1, width)
        moments.addmm_(x.T, x)
    return moments


@contextmanager
def one_norm(model: Any, checkpoint: Checkpoint, device: torch.device) -> Iterator[nn.Module]:
    """The norm before lm_head, with its weight."""
    norm = model.model.norm
    norm.load_state_dict({"weight": checkpoint.load("model.norm.weight", torch.float32)}, assign=True)
    try:
        yield norm.to(device)
    finally:
        norm.to("meta")


@contextmanager
def one_layer(model: Any, checkpoint: Checkpoint, index: int, device: torch.device) -> Iterator[nn.Module]:
    """The model as if it had only layer ``index`` and no final norm; that layer's weights are loaded."""
    text = model.model
    prefix = layer_prefix(index)
    layer = text.layers[index]
    state = {name: checkpoint.load(prefix + name, torch.float32) for name in layer.state_dict()}
    layer.load_state_dict(state, assign=True)
    del state
    layer.to(device)
    text.rotary_emb.to(device)
    kept = text.layers, text.norm, text.config
    config = copy.copy(text.config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index]]
    text.layers, text.norm, text.config = nn.ModuleList([layer]), nn.Identity(), config
    try:
        yield layer
    finally:
        text.layers, text.norm, text.config = kept
        layer.to("meta")


class _SecondMoments:
    """Adds up X X^T per input tensor, so that modules that read the same tensor share one matrix.

    Only the blocks on and below the diagonal are computed, until `finish`.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, torch.Tensor] = {}
        self._owner: dict[str, str] = {}  # module -> the module whose input it shares
        self._inputs: dict[int, tuple[torch.Tensor, str]] = {}  # of the current sample; holds them alive

    def hook(self, name: str):
        def pre_forward(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            _, owner = self._inputs.setdefault(id(x), (x, name))
            if self._owner.setdefault(name, owner) != owner:
                raise RuntimeError(f"{name} shares its input with other modules than before")
            if owner != name:
                self.by_name[name] = self.by_name[owner]
                return
            rows = x.reshape(-1, x.shape[-1])
            if name not in self.by_name:
                self.by_name[name] = torch.zeros(rows.shape[1], rows.shape[1], device=x.device)
            add_lower(self.by_name[name], rows)

        return pre_forward

    def end_sample(self) -> None:
        self._inputs.clear()

    def finish(self) -> dict[str, torch.Tensor]:
        """The matrices by name, whole."""
        for name in set(self._owner.values()):
            mirror(self.by_name[name])
        return self.by_name


def add_lower(lower: torch.Tensor, rows: torch.Tensor) -> None:
    """Add X X^T of ``rows`` [tokens, cols] to the blocks of ``lower`` on and below the diagonal."""
    for start in range(0, len(lower), BLOCK):
        part = rows[:, start : start + BLOCK]
        lower[start:, start : start + BLOCK].addmm_(rows[:, start:].T, part)


def mirror(matrix: torch.Tensor) -> None:
    """Fill in the blocks above the diagonal from those below."""
    for start in range(0, len(matrix), BLOCK):
        stop = start + BLOCK
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T

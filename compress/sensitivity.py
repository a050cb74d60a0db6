"""How much the predictions of a model suffer from errors in each of its linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vllm_prinmix.compress import stream
from vllm_prinmix.compress.model import is_tied, layer_prefix
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint

# Of each sample its first so many tokens are run, and so many in all: means over a few thousand tokens are
# all that is wanted, and the inputs of every layer have to be kept for the way back.
WINDOW, TOKENS = 256, 4096
LEAST = 0.01  # of the mean weight: what counts for nothing on these samples may count on others


def sensitivities(
    model: Any,
    checkpoint: Checkpoint,
    samples: list[torch.Tensor],
    device: torch.device,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """The mean square of d log p(token) / d output, per output element, of each linear layer by weight name.

    Tokens are drawn from the model's own predictions, so that this is the Fisher information of the outputs:
    small independent errors in them change the predictions by KL = 1/2 sum of sensitivity x squared error.
    ``model`` is on the meta device, ``samples`` are int64 token ids [tokens]. One decoder layer is in memory
    at a time, once on the way forward and once on the way back.
    """
    hidden = stream.embed(checkpoint, _some(samples))
    inputs: list[list[torch.Tensor]] = []  # of each layer
    layers = model.config.num_hidden_layers
    for index in range(layers):
        tell(f"layer {index}: how much its errors matter")
        inputs.append(list(hidden))
        stream.run_layer(model, checkpoint, index, hidden, set(), device)
    gradients = _at_the_end(model, checkpoint, hidden, device)
    tokens = sum(states.shape[1] for states in hidden)
    found: dict[str, float] = {}
    for index in reversed(range(layers)):
        tell(f"layer {index}: how much its errors matter")
        found |= _backwards(model, checkpoint, index, inputs.pop(), gradients, device)
    return {name: squares / tokens for name, squares in found.items()}


def importance(sensitivity: Mapping[str, float], energy: Mapping[str, float]) -> dict[str, float]:
    """What a relative error of each matrix counts when bytes are shared, up to a factor.

    ``energy`` is ||dW X||^2. Sensitivity x energy is the KL divergence that losing the whole change would
    cause, to first order. Its square root shares better than itself: measured, and not surprising, since
    changes are not small and errors pass through all later layers (docs/quality.md, "Tried and left out").
    """
    roots = {name: math.sqrt(sensitivity[name] * energy[name]) for name in energy}
    least = LEAST * sum(roots.values()) / max(1, len(roots))
    return {name: max(root, least) or 1.0 for name, root in roots.items()}


def _some(samples: list[torch.Tensor]) -> list[torch.Tensor]:
    chosen, left = [], TOKENS
    for sample in samples:
        part = sample[: min(WINDOW, left)]
        if len(part):
            chosen.append(part)
            left -= len(part)
    return chosen


def _at_the_end(
    model: Any, checkpoint: Checkpoint, hidden: list[torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    """The gradients with respect to the last layer's outputs: float32 [1, tokens, hidden], on the CPU."""
    head = checkpoint.load(EMBEDDING if is_tied(model) else HEAD, torch.float32).to(device)
    draw = torch.Generator().manual_seed(0)
    gradients = []
    with stream.one_norm(model, checkpoint, device) as norm:
        for states in hidden:
            x = states.to(device).requires_grad_()
            with torch.enable_grad():
                logits = functional.linear(norm(x)[0], head)
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draw)[:, 0]
                loss = functional.cross_entropy(logits, drawn.to(device), reduction="sum")
            gradients.append(torch.autograd.grad(loss, x)[0].cpu())
    return gradients


def _backwards(
    model: Any,
    checkpoint: Checkpoint,
    index: int,
    inputs: list[torch.Tensor],
    gradients: list[torch.Tensor],
    device: torch.device,
) -> dict[str, float]:
    """Take ``gradients`` back through layer ``index`` in place; sums over tokens of the linears' squares."""
    squares: dict[str, float] = {}
    outputs: dict[str, torch.Tensor] = {}
    with stream.one_layer(model, checkpoint, index, device) as layer:
        linears = {
            f"{layer_prefix(index)}{name}.weight": module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
        hooks = [module.register_forward_hook(_keep(outputs, name)) for name, module in linears.items()]
        for i, states in enumerate(inputs):
            x = states.to(device).requires_grad_()
            with torch.enable_grad():
                y = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
            before, *found = torch.autograd.grad(y, [x, *outputs.values()], gradients[i].to(device))
            for name, gradient in zip(outputs, found, strict=True):
                squares[name] = squares.get(name, 0.0) + float(gradient.square().mean(-1).sum())
            outputs.clear()
            gradients[i] = before.cpu()
        for hook in hooks:
            hook.remove()
    return squares


def _keep(outputs: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        outputs[name] = output

    return hook

"""Each layer fitted to what it will get: it makes up for what the compressed layers before it get wrong.

A layer's inputs in the compressed model, y, are not those in the fine-tuned one, x. So that its outputs are
near the fine-tune's W x, its change dW is fitted with a correction C: (W + C) y is W x as nearly as can be,

    C = W D (H + damping)^-1,    D = sum (x - y) y^T,    H = sum y y^T

over the calibration tokens (QEP, Arai & Ichikawa, 2025, arXiv 2504.09629). What o_proj and down_proj write is
added to the residual stream, where the errors of all layers before are: they make up for these too, with
sum r y^T added to W D, r the fine-tune's residual less the compressed model's. A tied embedding is compressed
last, as lm_head, and what it gets wrong of the first layer's inputs is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_prinmix.compress import stream
from vllm_prinmix.compress.corrections import Sums, finish
from vllm_prinmix.compress.metrics import embedding_hessian, hessians, tied_hessian
from vllm_prinmix.compress.model import build_model, is_tied, layer_prefix
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD, Checkpoint

BATCH_TOKENS = 2048  # of samples that are run at once, but for longer ones
# What writes to the residual stream, and the module whose input the stream is before that.
WRITERS = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}


@dataclass(frozen=True)
class Fit:
    """What one matrix is fitted to: dW + ``correction`` (float32 [rows, cols]; None: 0) in the metric."""

    name: str
    hessian: Hessian
    correction: torch.Tensor | None
    warnings: Sequence[str] = ()  # of the metric

    def target(self, dw: torch.Tensor) -> torch.Tensor:
        """What is compressed in dW's place."""
        return dw if self.correction is None else dw + self.correction


def fits(
    model: Any,
    base: Checkpoint,
    finetuned: Checkpoint,
    samples: list[torch.Tensor],
    wanted: set[str],
    device: torch.device,
    change: Callable[[str], torch.Tensor | None],
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[list[Fit]]:
    """All ``wanted`` matrices in the order of a forward pass, those with the same inputs together.

    When the next ones are asked for, ``change`` has to know dW^ of all before, by weight name: float32
    [rows, cols], None for what did not change. Metrics are those of the inputs in the compressed model; an
    embedding has the one of `metrics.hessians`, and no correction. ``model`` is on the meta device,
    ``samples`` are int64 token ids [tokens]. Two copies of one layer are in memory at a time, the fine-tune's
    and the compressed, with about five matrices of the size of the largest metric.
    """
    left = set(wanted)
    tied = is_tied(model)
    if EMBEDDING in left and not tied:
        yield [Fit(EMBEDDING, embedding_hessian(samples, model.config.vocab_size, device), None)]
        left.remove(EMBEDDING)
    if not left:
        return
    both = _Streams(model, base, finetuned, samples, device, None if tied else change(EMBEDDING))
    for index in range(model.config.num_hidden_layers):
        tell(f"layer {index}: running the calibration samples")
        yield from both.layer(index, left, change)
        if not left:
            return
    if tied:
        head = stream.head_moments(model, finetuned, both.hidden, device)
        yield [Fit(EMBEDDING, tied_hessian(head), None)]
    else:
        yield [both.head()]


def replay(
    model: Any,
    base: Checkpoint,
    finetuned: Checkpoint,
    samples: list[torch.Tensor],
    change: Callable[[str], torch.Tensor | None],
    names: set[str],
    compensated: bool,
    device: torch.device,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Fit]:
    """What the matrices ``names`` of a finished delta are measured in: as they were fitted.

    ``change`` gives dW^ by weight name, as in `fits`.
    """
    if not compensated:
        yield from alone(hessians(model, finetuned, samples, names, device, tell))
        return
    for group in fits(model, base, finetuned, samples, names, device, change, tell):
        while group:
            yield group.pop(0)


def alone(metrics: Iterable[tuple[str, Hessian]]) -> Iterator[Fit]:
    """Each matrix fitted to its own change; none is kept when the next is asked for."""
    for name, hessian in metrics:
        yield Fit(name, hessian, None)
        del hessian


class _Streams:
    """The samples' hidden states between layers: the fine-tune's, and those of the compressed model.

    Of each batch of samples float32 [samples, tokens, hidden], on the CPU.
    """

    def __init__(
        self,
        model: Any,
        base: Checkpoint,
        finetuned: Checkpoint,
        samples: list[torch.Tensor],
        device: torch.device,
        embedding: torch.Tensor | None,
    ) -> None:
        self.model, self.base, self.finetuned, self.device = model, base, finetuned, device
        self.twin = build_model(model.config)  # runs the compressed layers
        batches = list(_batches(samples))
        self.halves = [half for half, _ in batches]
        tokens = [ids for _, ids in batches]
        self.hidden = stream.embed(finetuned, tokens)
        self.drifted = list(self.hidden)  # of a tied embedding: it is compressed last
        if embedding is not None:
            self.drifted = stream.embed(base, tokens)
            for states, ids in zip(self.drifted, tokens, strict=True):
                states += embedding[ids]

    def layer(
        self, index: int, left: set[str], change: Callable[[str], torch.Tensor | None]
    ) -> Iterator[list[Fit]]:
        """The fits of the matrices ``left`` in a layer, which are taken out; then both streams are past it.

        Nothing is run that is not needed for what is left.
        """
        prefix = layer_prefix(index)
        with (
            stream.one_layer(self.model, self.finetuned, index, self.device) as layer,
            stream.one_layer(self.twin, self.finetuned, index, self.device) as twin,
        ):
            groups = self._groups(layer)
            for group in groups:
                names = [f"{prefix}{name}.weight" for name in group if f"{prefix}{name}.weight" in left]
                last = group is groups[-1]
                if names or last:
                    found = self._fits(layer, twin, group, names, prefix, last)
                    if found:
                        yield found
                    del found
                left.difference_update(names)
                if not left:
                    return
                for name in group:
                    weight = f"{prefix}{name}.weight"
                    if (changed := change(weight)) is not None:
                        new = self.base.load(weight, torch.float32) + changed
                        module = twin.get_submodule(name)
                        module.weight = nn.Parameter(new.to(self.device), requires_grad=False)
            with torch.no_grad():
                for i, states in enumerate(self.drifted):
                    self.drifted[i] = _run(self.twin, states.to(self.device)).cpu()

    @torch.no_grad()
    def _groups(self, layer: nn.Module) -> list[list[str]]:
        """The layer's linears in the order of its forward pass, those with one input together."""
        inputs: dict[int, tuple[torch.Tensor, list[str]]] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                inputs.setdefault(id(args[0]), (args[0], []))[1].append(name)

            return keep

        linears = [(name, m) for name, m in layer.named_modules() if isinstance(m, nn.Linear)]
        hooks = [module.register_forward_pre_hook(hook(name)) for name, module in linears]
        _run(self.model, self.hidden[0][:1, :1].to(self.device))
        for each in hooks:
            each.remove()
        return [names for _, names in inputs.values()]

    @torch.no_grad()
    def _fits(
        self, layer: nn.Module, twin: nn.Module, group: list[str], names: list[str], prefix: str, last: bool
    ) -> list[Fit]:
        """Of the linears ``group`` those of the weights ``names``.

        With ``last`` the fine-tune's stream goes on past the layer.
        """
        residual = WRITERS.get(group[0])
        ours, theirs = (_Inputs(part, group[0], residual) for part in (layer, twin))
        modules: dict[str, Any] = {f"{prefix}{name}.weight": layer.get_submodule(name) for name in group}
        weights = [modules[name].weight for name in names]
        writer = weights[0] if residual and weights else None
        halves: list[Sums] = []
        # Not in TF32: what x and y differ by is small, and its rounding would be multiplied by W.
        try:
            for i, (states, drifted) in enumerate(zip(self.hidden, self.drifted, strict=True)):
                whole = ours.run(self.model, states.to(self.device), to_the_end=last)
                if names:
                    theirs.run(self.twin, drifted.to(self.device))
                    halves = halves or [Sums(theirs.input, writer) for _ in range(2)]
                    missing = None if residual is None else ours.residual - theirs.residual
                    halves[self.halves[i]].add(ours.input, theirs.input, missing)
                if last:
                    assert whole is not None
                    self.hidden[i] = whole.cpu()
        finally:
            ours.close()
            theirs.close()
        if not names:
            return []
        hessian, corrections, warned = finish(halves, weights)
        return [Fit(name, hessian, c, warned) for name, c in zip(names, corrections, strict=True)]

    @torch.no_grad()
    def head(self) -> Fit:
        """lm_head's, past the last layer."""
        halves: list[Sums] = []
        with stream.one_norm(self.model, self.finetuned, self.device) as norm:
            for half, states, drifted in zip(self.halves, self.hidden, self.drifted, strict=True):
                x, y = (norm(part.to(self.device)).flatten(0, 1) for part in (states, drifted))
                halves = halves or [Sums(y) for _ in range(2)]
                halves[half].add(x, y)
        weight = self.finetuned.load(HEAD, torch.float32).to(self.device)
        hessian, (correction,), warned = finish(halves, [weight])
        return Fit(HEAD, hessian, correction, warned)


class _Reached(Exception):
    """The forward pass has come to the module that it was for."""


class _Inputs:
    """What a linear of a layer reads in a forward pass, and the residual stream it adds to."""

    def __init__(self, layer: nn.Module, linear: str, residual: str | None) -> None:
        self.input = torch.empty(0)  # [tokens, cols]
        self.residual: Any = None  # [tokens, hidden], or None
        self._stop = True
        self._hooks = [layer.get_submodule(linear).register_forward_pre_hook(self._reach)]
        if residual is not None:
            self._hooks.append(layer.get_submodule(residual).register_forward_pre_hook(self._pass))

    def run(self, model: Any, states: torch.Tensor, to_the_end: bool = False) -> torch.Tensor | None:
        """As far as is needed, or through the whole layer: its output, as ``states``."""
        self._stop = not to_the_end
        try:
            return _run(model, states)
        except _Reached:
            return None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _reach(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.input = args[0].reshape(-1, args[0].shape[-1])
        if self._stop:
            raise _Reached

    def _pass(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.residual = args[0].reshape(-1, args[0].shape[-1])


def _batches(samples: list[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """(half, int64 [samples, tokens]): every other sample is of half 0, those of equal length go together.

    Short texts one by one would take most of their time to start.
    """
    alike: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
    for i, sample in enumerate(samples):
        alike[i % 2, len(sample)].append(sample)
    for (half, length), group in alike.items():
        step = max(1, BATCH_TOKENS // max(1, length))
        for start in range(0, len(group), step):
            yield half, torch.stack(group[start : start + step])


def _run(model: Any, states: torch.Tensor) -> torch.Tensor:
    return model.model(inputs_embeds=states, use_cache=False).last_hidden_state

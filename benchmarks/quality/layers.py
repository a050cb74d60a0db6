"""The held-out texts' activations, and the calibration's metric, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.quality.material import Material, batches
from benchmarks.quality.metrics import outliers
from vllm_prinmix.compress import stream
from vllm_prinmix.compress.metrics import data_free, hessians
from vllm_prinmix.compress.model import build_model, layer_prefix
from vllm_prinmix.compress.quantization.hessian import Hessian

PREFIX = "model.layers."


@dataclass(frozen=True)
class Activations:
    """Of one linear layer of the fine-tuned model on held-out texts."""

    inputs: torch.Tensor  # float32 [tokens, cols]
    outliers: torch.Tensor  # bool [tokens, rows]: the largest outputs


class Heldout:
    """Carries held-out texts through the fine-tuned model, one layer at a time and in order."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.model = build_model(material.model.config)  # the pass that it accompanies has the other
        self.hidden = stream.embed(material.finetuned, [batch.ids for batch in batches(material.texts)])
        self.next = 0

    def layer(self, index: int) -> dict[str, Activations]:
        """Activations of all linears of layer ``index`` by name; those that share an input share it."""
        while self.next < index:
            self._run(self.next)
        return self._run(index)

    def _run(self, index: int) -> dict[str, Activations]:
        assert index == self.next, "layers come in order"
        model, prefix = self.model, layer_prefix(index)
        seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        hooks = []
        for name, module in model.model.layers[index].named_modules():
            if isinstance(module, torch.nn.Linear):
                pairs = seen.setdefault(f"{prefix}{name}.weight", [])
                hooks.append(module.register_forward_hook(_keep(pairs)))
        try:
            stream.run_layer(
                model, self.material.finetuned, index, self.hidden, set(), self.material.limits.device
            )
        finally:
            for hook in hooks:
                hook.remove()
        self.next += 1
        shared: dict[tuple[int, ...], torch.Tensor] = {}
        found = {}
        for name, pairs in seen.items():
            same = tuple(id(x) for x, _ in pairs)
            if same not in shared:
                shared[same] = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in pairs])
            found[name] = Activations(
                shared[same], outliers(torch.cat([y.reshape(-1, y.shape[-1]) for _, y in pairs]))
            )
        return found


def _keep(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        pairs.append((args[0], output))

    return hook


def metrics_of(
    material: Material,
    samples: list[torch.Tensor],
    wanted: set[str],
    tell: Callable[[str], None],
    repeats: int = 0,
) -> Iterator[tuple[str, Hessian]]:
    """(name, metric of its inputs) of all ``wanted`` matrices: `hessians`, without samples `data_free`.

    ``repeats`` as of `hessians`; without samples there are none.
    """
    device = material.limits.device
    if samples:
        yield from hessians(material.model, material.finetuned, samples, wanted, device, tell, repeats)
    else:
        yield from data_free(material.model, material.base, material.finetuned, wanted, device)


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to."""
    return int(name.removeprefix(PREFIX).partition(".")[0]) if name.startswith(PREFIX) else None

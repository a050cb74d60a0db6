"""The two factors of Eq. 5 for one module, as in the paper's Figure 2: they need the models and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vllm_prinmix.compress.account import check_settings, check_tensors
from vllm_prinmix.compress.calibration import NONE
from vllm_prinmix.compress.lora import open_finetuned
from vllm_prinmix.compress.methods.paper import simulate
from vllm_prinmix.compress.metrics import data_free, hessians
from vllm_prinmix.compress.model import build_model, expected_tensors, layer_prefix, read_architecture
from vllm_prinmix.compress.quantization.svd import thin_svd
from vllm_prinmix.compress.report import short, spread
from vllm_prinmix.compress.verify import draw_again
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.format.delta import read_config
from vllm_prinmix.format.digest import sample_digest

WIDTHS = (2, 3, 4, 8)  # where the delta's method has no candidates


def terms(
    folder: Path,
    base_source: str,
    finetuned_source: str,
    calibration: str,
    module: str | None,
    console: Console,
    lora: bool = False,
) -> dict[str, Any]:
    """The "scaling" S_i^2 and, for each width, the "difference" dv_i X X^T dv_i^T of direction i (Eq. 5).

    ``module`` is a linear layer of the decoder, by default the last layer's q_proj. Its dW = U S V is
    decomposed and each row of V quantized to every candidate width of the delta's method. ``scaling`` and
    ``difference`` (by width) are lists of [rank from 1, value]. Raises PrinMixError for a module that there
    is not, one that is unchanged, and another base than the delta's.
    """
    config = read_config(folder)
    base = Checkpoint(base_source)
    if sample_digest(base) != config.base.sample_digest:
        raise PrinMixError(
            "this is not the base that the delta was made from", where=base.folder, expected=config.base.name
        )
    finetuned = open_finetuned(finetuned_source, base, lora)
    settings = read_architecture(finetuned)
    check_settings(read_architecture(base), settings, finetuned.folder)
    model = build_model(settings)
    check_tensors(finetuned, expected_tensors(model))
    name = _name(model, module)
    if calibration == NONE:
        metrics = data_free(model, base, finetuned, {name}, torch.device("cpu"))
    else:
        samples = draw_again(config, calibration, finetuned, base, settings.vocab_size)
        with console.status("Running the calibration samples"):
            metrics = iter(list(hessians(model, finetuned, samples.tokens, {name}, torch.device("cpu"))))
    _, hessian = next(metrics)
    _, sigma, v = thin_svd(finetuned.difference(base, name))
    if not len(sigma):
        raise PrinMixError("the module is unchanged", where=name, fix="give another one with --module")
    bits = config.settings.options.get("bits")
    widths = sorted(b for b in bits if b) if isinstance(bits, list) else list(WIDTHS)
    difference = simulate(v, torch.ones_like(sigma), hessian, widths)
    chosen = spread(len(sigma))
    return {
        "module": name,
        "scaling": [[i + 1, short(float(sigma[i]) ** 2)] for i in chosen],
        "difference": {
            str(b): [[i + 1, short(float(difference[i, column]))] for i in chosen]
            for column, b in enumerate(widths)
        },
    }


def _name(model: Any, module: str | None) -> str:
    """The weight's name, in full."""
    prefix = layer_prefix(model.config.num_hidden_layers - 1)
    name = module or f"{prefix}self_attn.q_proj"
    name = name if name.startswith("model.") else f"model.{name}"
    name = name if name.endswith(".weight") else f"{name}.weight"
    linears = [n for n in expected_tensors(model) if n.endswith("_proj.weight")]
    if name not in linears:
        raise PrinMixError(
            "there is no such linear layer", where="--module", found=module, expected=f"such as {linears[0]}"
        )
    return name

"""Outlier channels without training for them: the same function, with some activations made far larger.

In large language models a few channels are tens to hundreds of times larger than the others: the same few
of the hidden state in all layers, and a few in front of ``down_proj``. Tiny models have none. Here a channel
is multiplied where it is made (a norm's weight, a row of ``v_proj`` or ``up_proj``) and divided where it is
read.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def add_outliers(model: PreTrainedModel, channels: int, factor: float, seed: int) -> None:
    """Multiply ``channels`` input channels of every linear layer by ``factor``, in place.

    The same random channels of the hidden state behind all norms, others in each layer before ``o_proj`` (in
    value heads) and ``down_proj``. What the model computes stays the same, to the bit where ``factor`` is a
    power of two. Tied embeddings keep the final norm as it is, because they are read at the front too.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    hidden = torch.randperm(config.hidden_size, generator=generator)[:channels]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layer.input_layernorm.weight[hidden] *= factor
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj):
            reader.weight[:, hidden] /= factor
        layer.post_attention_layernorm.weight[hidden] *= factor
        for reader in (mlp.gate_proj, mlp.up_proj):
            reader.weight[:, hidden] /= factor
        values = torch.randperm(attention.v_proj.out_features, generator=generator)[:channels]
        attention.v_proj.weight[values] *= factor
        if attention.v_proj.bias is not None:
            attention.v_proj.bias[values] *= factor
        attention.o_proj.weight[:, _read_by(attention, values)] /= factor
        inner = torch.randperm(mlp.up_proj.out_features, generator=generator)[:channels]
        mlp.up_proj.weight[inner] *= factor
        mlp.down_proj.weight[:, inner] /= factor
    if not config.tie_word_embeddings:
        model.model.norm.weight[hidden] *= factor
        model.lm_head.weight[:, hidden] /= factor


def _read_by(attention: Any, values: torch.Tensor) -> torch.Tensor:
    """Columns of ``o_proj`` that read these rows of ``v_proj``: a value head serves several query heads."""
    size, group = attention.head_dim, attention.num_key_value_groups
    heads = values // size * group + torch.arange(group)[:, None]
    return (heads * size + values % size).flatten()

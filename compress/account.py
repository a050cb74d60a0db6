"""Checks before any work: the two checkpoints fit each other, and every tensor is accounted for."""

from __future__ import annotations

from typing import Any

import torch

from vllm_prinmix.compress.model import Kind
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import EMBEDDING, FLOATS, HEAD, Checkpoint, brief

# A delta changes weights only: the server computes with the base's settings, so these must be equal.
SHAPE_SETTINGS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
FUNCTION_SETTINGS = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "layer_types",
)


def check_settings(base: Any, finetuned: Any, where: object) -> None:
    """Compare two transformers configs; raises PrinMixError naming the first setting that differs."""
    if finetuned.vocab_size > base.vocab_size:
        raise PrinMixError(
            "the fine-tune has added vocabulary, which a delta cannot hold",
            where=where,
            found=f"vocab_size {finetuned.vocab_size}",
            expected=f"{base.vocab_size}, the base's",
            fix="fine-tune with the base's vocabulary (many bases have unused token ids for new tokens)",
        )
    for name in ("vocab_size", *SHAPE_SETTINGS):
        _compare("base and fine-tune are models of another shape", name, base, finetuned, where)
    for name in FUNCTION_SETTINGS:
        _compare(
            "base and fine-tune compute differently, which a delta cannot hold", name, base, finetuned, where
        )


def _compare(what: str, name: str, base: Any, finetuned: Any, where: object) -> None:
    expected, found = _setting(base, name), _setting(finetuned, name)
    if expected != found:
        raise PrinMixError(
            what,
            where=where,
            found=f"{name} = {found}",
            expected=f"{expected}, the base's",
            fix="give the base that this model was fine-tuned from",
        )


def _setting(config: Any, name: str) -> Any:
    value = getattr(config, name, None)
    if name == "head_dim" and value is None:
        return config.hidden_size // config.num_attention_heads
    return value


def check_tensors(checkpoint: Checkpoint, expected: dict[str, tuple[Kind, tuple[int, ...]]]) -> None:
    """Every expected tensor is there, in shape and in a float dtype, and there is no other.

    Raises PrinMixError that names missing, extra and misshapen tensors. Two kinds of extra tensors are
    no weights and pass: old checkpoints' rotary tables, and a copy of tied embeddings under lm_head.
    """
    where = checkpoint.folder
    if missing := [name for name in expected if name not in checkpoint.tensors]:
        raise PrinMixError(f"{len(missing)} tensor(s) are missing", where=where, found=f"no {brief(missing)}")
    extra = [
        name for name in checkpoint.tensors if name not in expected and not _is_known_copy(name, checkpoint)
    ]
    if extra:
        raise PrinMixError(
            f"{len(extra)} tensor(s) belong to no module of this architecture",
            where=where,
            found=brief(sorted(extra)),
            fix="a delta must account for every tensor: remove them, or give the plain checkpoint",
        )
    for name, (_, shape) in expected.items():
        stored = checkpoint.tensors[name]
        if stored.shape != shape:
            raise PrinMixError(
                f"tensor {name} has another shape than config.json says",
                where=where,
                found=stored.shape,
                expected=shape,
            )
        if stored.dtype not in FLOATS:
            raise PrinMixError(
                f"tensor {name} has a dtype that is not supported",
                where=where,
                found=stored.dtype,
                expected=", ".join(FLOATS),
            )


def _is_known_copy(name: str, checkpoint: Checkpoint) -> bool:
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if name != HEAD:
        return False
    head, embedding = checkpoint.tensors[HEAD], checkpoint.tensors[EMBEDDING]
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    return same and all(
        a == b for a, b in zip(checkpoint.chunks(HEAD), checkpoint.chunks(EMBEDDING), strict=True)
    )


def check_finite(checkpoint: Checkpoint, name: str, chunk: bytes) -> None:
    """Raise PrinMixError where a piece of tensor ``name`` holds NaN or infinity."""
    dtype = FLOATS.get(checkpoint.tensors[name].dtype)
    if dtype is None:
        return
    values = torch.frombuffer(bytearray(chunk), dtype=getattr(torch, dtype))
    low, high = torch.aminmax(values)  # NaN wins in both
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = int((~torch.isfinite(values)).sum())
        raise PrinMixError(
            f"tensor {name} holds NaN or infinite values",
            where=checkpoint.tensors[name].file,
            found=f"{bad} of {values.numel()} values in one piece of it",
            expected="finite weights",
            fix="train or export the checkpoint again",
        )

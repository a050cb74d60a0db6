"""Tiny, randomly initialised pairs of checkpoints: they test the mechanics, not the quality."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 160
ARCHITECTURES = ("qwen2", "qwen3", "llama", "mistral")


@dataclass
class Pair:
    base: Path
    finetuned: Path
    calibration: Path


def tiny_config(architecture: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    shape = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return AutoConfig.for_model(architecture, **(shape | settings))


def build(config: Any, seed: int) -> Any:
    """A model with every parameter random: also the biases and norm weights that start as zeros and ones."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    return model


def finetune(model: Any, seed: int, size: float = 0.1) -> None:
    """Change every parameter: a matrix by a spectrum that falls off, a vector by noise."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(size * torch.randn_like(parameter))
                continue
            rows, cols = parameter.shape
            spectrum = 0.8 ** torch.arange(24)
            change = (torch.randn(rows, 24) * spectrum) @ torch.randn(24, cols)
            parameter.add_(size * change * parameter.norm() / change.norm())


def write_tokenizer(folder: Path) -> None:
    """One token per printable character; <s> (1) is put first, and recognised where a text holds it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.save_pretrained(folder)


def write_calibration(path: Path, lines: int = 8) -> Path:
    alphabet = string.ascii_letters + string.digits
    rows = ["".join(alphabet[(7 * i + i * j * j) % 60] for j in range(20 + 3 * i)) for i in range(lines)]
    path.write_text("\n".join(rows) + "\n")
    return path


def options(pair: Pair, out: Path, **changes: Any) -> Any:
    """Options of `prinmix compress` with the fast solver, so that a tiny pair takes a second or two."""
    from vllm_prinmix.compress.methods.paper import Paper
    from vllm_prinmix.compress.prepare import Options

    paper = {"bits": (0, 2, 3, 4, 8), "max_active_bits": 4, "solver": "exact"}
    paper |= {name: changes.pop(name) for name in list(changes) if name in paper}
    return Options(
        base=str(pair.base),
        finetuned=str(pair.finetuned),
        out=out,
        **{"calibration": str(pair.calibration), "device": "cpu", "method": Paper(**paper)} | changes,
    )

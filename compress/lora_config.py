"""adapter_config.json of a PEFT LoRA adapter: which modules it changes, and how strongly."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import HEAD

CONFIG = "adapter_config.json"

# Settings that change nothing about what the stored tensors mean.
NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "unsloth_fixed",
}  # fmt: skip
USED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "bias", "modules_to_save", "init_lora_weights",
}  # fmt: skip
# Ways to start that leave the base as it is. The others (PiSSA, OLoRA, LoftQ, ...) take a part out of it.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraConfig:
    """What of adapter_config.json decides the merged weights. Modules are named as in the base."""

    base: str | None  # the name it gives for its base: for people
    r: int
    alpha: float
    rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str
    layers: list[int] | None
    bias: str
    modules_to_save: list[str]

    def rank(self, module: str) -> int:
        return _of_pattern(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """alpha / r, or with rsLoRA alpha / sqrt(r)."""
        rank = self.rank(module)
        alpha = _of_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether a matrix's module is one that PEFT would give factors to."""
        if self.exclude_modules and _named(self.exclude_modules, module):
            return False
        if self.layers is not None:
            index = re.search(r"\.layers\.(\d+)\.", module)
            if index is None or int(index[1]) not in self.layers:
                return False
        if self.target_modules == "all-linear":
            return module.endswith("_proj") and f"{module}.weight" != HEAD
        return self.target_modules is not None and _named(self.target_modules, module)


def _named(names: list[str] | str, module: str) -> bool:
    """A string is a pattern for the whole name; a list has names, or ends of names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _of_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that is a pattern for the module's name or for an end of it."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read_lora_config(folder: Path) -> LoraConfig:
    """The checked adapter_config.json of ``folder``.

    Raises PrinMixError where it is missing or damaged, is of another kind of adapter, or has a setting on
    that is not known here: it may change what the tensors mean.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise PrinMixError(
            "not a PEFT adapter",
            where=folder,
            expected=f"a folder with {CONFIG} and adapter_model.safetensors",
            fix="give a full checkpoint with --finetuned",
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"a {type(fields).__name__}")
    except ValueError as error:
        raise PrinMixError("the adapter's config is not a JSON object", where=path, found=error) from error
    if fields.get("peft_type") != "LORA":
        raise _unsupported(path, f"peft_type {fields.get('peft_type')}", "LORA")
    for name in sorted(set(fields) - NEUTRAL - USED):
        if fields[name]:  # off, empty or null: a plain LoRA adapter
            raise _unsupported(path, f"{name} = {fields[name]}", f"{name} off: plain LoRA")
    start = fields.get("init_lora_weights")
    if start not in STARTS:
        raise PrinMixError(
            "the adapter belongs to a changed base: its start took a part out of the base's weights",
            where=path,
            found=f"init_lora_weights {start}",
            expected=", ".join(map(str, STARTS)),
            fix="save it with PEFT's path_initial_model_for_weight_conversion, or merge it first",
        )
    try:
        return _parse(fields)
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise PrinMixError(
            "the adapter's config cannot be used", where=path, found=f"{type(error).__name__}: {error}"
        ) from error


def _parse(fields: dict[str, Any]) -> LoraConfig:
    layers = fields.get("layers_to_transform")
    bias = fields.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias {bias}")
    ranks = {key: int(value) for key, value in (fields.get("rank_pattern") or {}).items()}
    alphas = {key: float(value) for key, value in (fields.get("alpha_pattern") or {}).items()}
    targets, excluded = fields.get("target_modules"), fields.get("exclude_modules") or []
    for pattern in (*ranks, *alphas, *(x for x in (targets, excluded) if isinstance(x, str))):
        re.compile(pattern)
    if min(int(fields["r"]), *ranks.values(), 1) < 1:
        raise ValueError("a rank below 1")
    return LoraConfig(
        base=fields.get("base_model_name_or_path"),
        r=int(fields["r"]),
        alpha=float(fields["lora_alpha"]),
        rslora=bool(fields.get("use_rslora")),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        target_modules=targets,
        exclude_modules=excluded,
        layers=[layers] if isinstance(layers, int) else layers,
        bias=bias,
        modules_to_save=fields.get("modules_to_save") or [],
    )


def _unsupported(path: Path, found: str, expected: str) -> PrinMixError:
    return PrinMixError(
        "this kind of adapter is not supported",
        where=path,
        found=found,
        expected=expected,
        fix="merge it into its base with PEFT (merge_and_unload) and give the result with --finetuned",
    )

"""A PEFT LoRA adapter merged into its base, seen as a fine-tuned checkpoint; nothing is written to disk.

Merged tensors exist one at a time, when they are asked for. What the adapter leaves alone is the base's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_prinmix.compress.lora_config import CONFIG, LoraConfig, read_lora_config
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import (
    EMBEDDING,
    FLOATS,
    HEAD,
    Checkpoint,
    StoredTensor,
    brief,
    read_header,
    resolve_folder,
)

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before the base's names
FACTORS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding A",
    ".lora_embedding_B": "embedding B",
}


@dataclass(frozen=True)
class _Pair:
    """dW = scaling * B A, of a linear; (B A)^T, of an embedding. The names are keys of the adapter's file."""

    a: str
    b: str
    scaling: float
    transposed: bool


class _Tensors(Checkpoint):
    """A reader of tensors wherever they lie, with the config and folder that are given."""

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
        self.folder = self.config_folder = folder
        self.config, self.tensors = config, tensors


class MergedLora(Checkpoint):
    """``base`` + the adapter in folder ``source`` (or its id in the local Hugging Face cache).

    A tensor with LoRA factors is float32, W + scaling * B A, computed in float32; one that the adapter holds
    whole (modules_to_save, biases) is as stored there; every other is the base's. ``folder`` is the
    adapter's, where its tokenizer and chat template are; ``config`` is the base's.

    Raises PrinMixError for an adapter of another kind than plain LoRA, pickled weights, tensors that fit no
    module of the base, in name or shape, and tensors that the adapter's config says there are but are not.
    """

    def __init__(self, base: Checkpoint, source: str | Path) -> None:
        self.folder = resolve_folder(source)
        self.lora: LoraConfig = read_lora_config(self.folder)
        self.config, self.config_folder = base.config, base.config_folder
        self._adapter = _Tensors(self.folder, {}, _read_tensors(self.folder))
        factors, whole = self._sort_keys()
        self._base = base
        # Before LoRA: the base with the tensors that the adapter replaces.
        self._plain = _Tensors(self.folder, base.config, base.tensors | whole)
        self._check_whole(whole)
        self._pairs = {f"{module}.weight": self._pair(module, keys) for module, keys in factors.items()}
        self._check_complete(set(factors), set(whole))
        self._check_tied(set(whole))
        # A pair of zeros, as LoRA starts with, changes nothing: the tensor stays the base's, bit for bit.
        self._pairs = {name: pair for name, pair in self._pairs.items() if self._is_change(pair)}
        self.tensors = self._plain.tensors | {name: self._merged_entry(name) for name in self._pairs}

    def load(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self._pairs:
            return super().load(name, dtype)
        merged = self._plain.load(name, torch.float32)
        left, right, scaling = self._factors(name)
        merged.addmm_(left, right, alpha=scaling)
        return merged if dtype is None else merged.to(dtype)

    def difference(self, base: Checkpoint, name: str) -> torch.Tensor:
        """As in `Checkpoint`, but of the low rank that it has: without the rounding of W + dW - W."""
        if name not in self._pairs:
            return super().difference(base, name)
        left, right, scaling = self._factors(name)
        change = (left @ right).mul_(scaling)
        if self._plain.tensors[name] != self._base.tensors[name]:
            change += self._plain.difference(base, name)
        return change

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        if name not in self._pairs:
            return super().read(name, start, length)
        data = self.load(name).numpy().tobytes()
        return data[start:] if length is None else data[start : start + length]

    def chunks(self, name: str, size: int = 1 << 24) -> Iterator[bytes]:
        if name not in self._pairs:
            yield from super().chunks(name, size)
            return
        flat = self.load(name).view(-1).numpy().view("u1")
        for start in range(0, flat.size, size):
            yield flat[start : start + size].tobytes()

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """float32 [rows, r], [r, cols] and the scaling of their product."""
        pair = self._pairs[name]
        a, b = (self._adapter.load(key, torch.float32) for key in (pair.a, pair.b))
        return (a.T, b.T, pair.scaling) if pair.transposed else (b, a, pair.scaling)

    def _is_change(self, pair: _Pair) -> bool:
        return all(bool(self._adapter.load(key).any()) for key in (pair.a, pair.b))

    def _merged_entry(self, name: str) -> StoredTensor:
        """Stands for a tensor that lies nowhere; its size is right, and its file is where it comes from."""
        shape = self._base.tensors[name].shape
        entry = StoredTensor(name, "F32", shape, self.folder / WEIGHTS, 0, 0)
        return replace(entry, end=4 * entry.numel)

    def _sort_keys(self) -> tuple[dict[str, dict[str, str]], dict[str, StoredTensor]]:
        """(module -> part, such as "A", -> key; the base's name -> a tensor that is stored whole)."""
        factors: dict[str, dict[str, str]] = {}
        whole: dict[str, StoredTensor] = {}
        unknown = []
        for key, stored in self._adapter.tensors.items():
            path = key.removeprefix(PREFIX)
            suffix = next((suffix for suffix in FACTORS if path.endswith(suffix)), None)
            # PEFT calls the tensors of a module that has LoRA factors too those of its base layer.
            name = path.replace(".base_layer.", ".")
            if path == key or (suffix is None and not name.endswith((".weight", ".bias"))):
                unknown.append(key)
            elif suffix is not None:
                factors.setdefault(path.removesuffix(suffix), {})[FACTORS[suffix]] = key
            elif name in whole:
                raise self._error(f"{name} is stored twice", found=key)
            else:
                whole[name] = replace(stored, name=name)
        if unknown:
            raise self._error(
                f"{len(unknown)} tensor(s) are of a kind that is not supported",
                found=brief(sorted(unknown)),
                expected=f"{PREFIX}MODULE with {', '.join(FACTORS)}, .weight or .bias",
            )
        return factors, whole

    def _pair(self, module: str, keys: dict[str, str]) -> _Pair:
        """The factors of one module, when they fit each other, the config and the base."""
        name = f"{module}.weight"
        if name not in self._base.tensors:
            raise self._error("LoRA factors fit no module of the base", found=", ".join(keys.values()))
        embedded = name == EMBEDDING
        expected = ("embedding A", "embedding B") if embedded else ("A", "B")
        if set(keys) != set(expected):
            raise self._error(
                f"{name} has not the two LoRA factors that it needs",
                found=brief(sorted(keys.values())),
                expected=" and ".join(f"{module}{s}" for s, part in FACTORS.items() if part in expected),
            )
        a, b = (keys[part] for part in expected)
        rank = self.lora.rank(module)
        rows, cols = self._base.tensors[name].shape
        if embedded:
            rows, cols = cols, rows
        for key, shape in ((a, (rank, cols)), (b, (rows, rank))):
            if self._adapter.tensors[key].shape != shape:
                raise self._error(
                    f"{key} does not fit the base and the adapter's rank",
                    found=self._adapter.tensors[key].shape,
                    expected=shape,
                    fix="give the base that this adapter was trained on",
                )
        return _Pair(a, b, self.lora.scaling(module), embedded)

    def _check_whole(self, whole: dict[str, StoredTensor]) -> None:
        known = {**self._base.tensors}
        if EMBEDDING in known:
            known.setdefault(HEAD, known[EMBEDDING])  # of tied embeddings; see _check_tied
        if unmatched := sorted(set(whole) - set(known)):
            raise self._error(f"{len(unmatched)} tensor(s) fit no module of the base", found=brief(unmatched))
        for name, stored in whole.items():
            if stored.shape != known[name].shape:
                raise self._error(
                    f"{name} has another shape than in the base",
                    found=stored.shape,
                    expected=known[name].shape,
                    fix="give the base that this adapter was trained on; added vocabulary is not supported",
                )

    def _check_complete(self, adapted: set[str], whole: set[str]) -> None:
        """Everything that the config speaks of is there, and no factors that PEFT would not load."""
        base = self._base.tensors
        matrices = {name.removesuffix(".weight") for name, stored in base.items() if len(stored.shape) == 2}
        targeted = {module for module in matrices if self.lora.targets(module)}
        saved = {name.rpartition(".")[0] for name in whole}
        if self.lora.target_modules is not None:
            for found, what in (
                (targeted - adapted - saved, "the adapter has no factors of modules that it targets"),
                (adapted - targeted, "the adapter has factors of modules that it does not target"),
            ):
                if found:
                    raise self._error(what, found=brief(sorted(found)), expected=self.lora.target_modules)
        for wanted in self.lora.modules_to_save:
            if not any(module == wanted or module.endswith(f".{wanted}") for module in saved):
                raise self._error("a module of modules_to_save is missing", found=f"no tensor of {wanted}")
        biases = {name for name in base if name.endswith(".bias")}
        if self.lora.bias == "lora_only":
            biases = {name for name in biases if name.removesuffix(".bias") in adapted}
        if self.lora.bias != "none" and (missing := sorted(biases - whole)):
            raise self._error("biases are missing", found=f"no {brief(missing)}", expected=self.lora.bias)

    def _check_tied(self, whole: set[str]) -> None:
        """With tied embeddings an adapter can change one use and not the other, which a delta cannot hold."""
        tied = self._base.config.get("tie_word_embeddings", HEAD not in self._base.tensors)
        touched = {EMBEDDING, HEAD} & {*self._pairs, *whole}
        if not tied or not touched:
            return
        same = touched == {EMBEDDING, HEAD} and not touched & set(self._pairs)
        if not same or not torch.equal(self._plain.load(EMBEDDING), self._plain.load(HEAD)):
            raise self._error(
                "the adapter unties the base's embedding and lm_head, which a delta cannot hold",
                found=", ".join(sorted(touched)),
                expected="neither of them, or the same tensor for both",
            )

    def _error(self, what: str, **details: Any) -> PrinMixError:
        return PrinMixError(what, where=self.folder / WEIGHTS, **details)


def open_finetuned(source: str | Path, base: Checkpoint, lora: bool) -> Checkpoint:
    """The fine-tune: a checkpoint, or with ``lora`` an adapter of ``base``."""
    return MergedLora(base, source) if lora else Checkpoint(source)


def _read_tensors(folder: Path) -> dict[str, StoredTensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        raise PrinMixError(
            "the adapter's weights are pickled, and pickles can run code when they are read"
            if pickled.is_file()
            else "the adapter has no weights",
            where=pickled if pickled.is_file() else folder,
            expected=f"{WEIGHTS} beside {CONFIG}",
            fix="load it with PEFT and save it again: save_pretrained() writes safetensors",
        )
    tensors = {stored.name: stored for stored in read_header(path)}
    if bad := [stored for stored in tensors.values() if stored.dtype not in FLOATS]:
        raise PrinMixError(
            f"{bad[0].name} has a dtype that is not supported",
            where=path,
            found=bad[0].dtype,
            expected=", ".join(FLOATS),
        )
    return tensors

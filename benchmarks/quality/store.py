"""What is kept between runs: finished results, and the compressed matrices of unfinished ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.quality.schemes import Dense
from benchmarks.quality.settings import Change
from vllm_prinmix.format.payload import decode, encode
from vllm_prinmix.format.schema import Module
from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix

_MODULE: TypeAdapter[Any] = TypeAdapter(Module)


class Store:
    """OUT/results.jsonl: one line per finished run, its key and its figures. A torn last line is ignored."""

    def __init__(self, out: Path) -> None:
        self.path = out / "results.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, dict[str, Any]] = {}
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.results[name_of(entry["key"])] = entry["result"]

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return self.results.get(name_of(key))

    def add(self, key: dict[str, Any], result: dict[str, Any]) -> None:
        torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write("\n" * torn + json.dumps({"key": key, "result": result}) + "\n")
        self.results[name_of(key)] = result


@dataclass(frozen=True)
class Packed:
    """A compressed matrix as it lies on disk, and as a reader gets it from there."""

    tensor: torch.Tensor  # the payload, or float32 for what the format does not hold
    spec: str | None  # description of the payload, JSON
    bytes: int
    dense: torch.Tensor  # float32 [rows, cols]


def pack(change: Change, transposed: bool) -> Packed:
    """``transposed``: ``change`` is that of the matrix's transpose."""
    if isinstance(change, Dense):
        dense = (change.weight.T if transposed else change.weight).contiguous().cpu()
        return Packed(dense if change.kept else dense.new_empty(0), None, change.bytes, dense)
    if transposed:
        assert isinstance(change, QuantizedFactors), "see Method.for_embedding"
        change = change.transpose()
    spec, payload = encode(change)
    return Packed(payload, spec.model_dump_json(), payload.numel(), decode(spec, payload).dense())


class Work:
    """Folder work/KEY of OUT: the compressed matrices of one run, until it is scored."""

    def __init__(self, out: Path, key: dict[str, Any]) -> None:
        self.folder = out / "work" / name_of(key)

    def __contains__(self, name: str) -> bool:
        return self._file(name).is_file()

    def save(self, name: str, packed: Packed, figures: dict[str, Any]) -> None:
        """Keep a matrix and its figures; "bytes" are added to them."""
        metadata = {"figures": json.dumps({**figures, "bytes": packed.bytes})}
        if packed.spec is not None:
            metadata["spec"] = packed.spec
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self._file(name).with_suffix(".tmp")
        save_file({"payload": packed.tensor.contiguous()}, new, metadata)
        new.replace(self._file(name))

    def load(self, name: str) -> tuple[torch.Tensor, dict[str, Any]]:
        """(dense float32 change, or nothing of a reference's; figures)."""
        tensor, metadata = self._read(name)
        if "spec" in metadata:
            tensor = decode(_MODULE.validate_json(metadata["spec"]), tensor).dense()
        return tensor, json.loads(metadata["figures"])

    def quantized(self, name: str) -> QuantizedFactors | QuantizedMatrix:
        """The quantized form of a matrix that the format holds."""
        tensor, metadata = self._read(name)
        return decode(_MODULE.validate_json(metadata["spec"]), tensor)

    def _read(self, name: str) -> tuple[torch.Tensor, dict[str, str]]:
        with safe_open(self._file(name), framework="pt") as file:
            return file.get_tensor("payload"), file.metadata()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def name_of(key: dict[str, Any]) -> str:
    """A short name of a run's key, the same for equal keys."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]

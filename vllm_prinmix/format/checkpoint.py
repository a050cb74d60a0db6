"""Lazy reader of a Hugging Face checkpoint: names, shapes and dtypes at once, bytes one tensor at a time.

Nothing here imports torch until a tensor is loaded, because the server scans checkpoints at start too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_prinmix.errors import PrinMixError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"

# What Hugging Face's checkpoints of decoder models call these two; tied ones have the first only.
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Bytes per element of what safetensors can hold; only the floating ones below can be loaded.
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
FLOATS: dict[str, Literal["bfloat16", "float16", "float32"]] = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes ``begin`` to ``end`` (excluded) of ``file``."""

    name: str
    dtype: str  # as safetensors spells it: BF16, F16, F32, ...
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Checkpoint:
    """An opened checkpoint: ``config`` (config.json) and ``tensors`` by name; bytes are read on demand.

    ``folder`` has its files, ``config_folder`` its config.json.
    ``source`` is a folder, or the id of a model that is already in the local Hugging Face cache. Without
    ``weights`` only the config is read, and there are no tensors.

    Raises PrinMixError where the folder, config.json, a shard or an index entry is missing, a file is
    truncated or not safetensors, or the weights are pickled.
    """

    def __init__(self, source: str | Path, weights: bool = True) -> None:
        self.folder = self.config_folder = resolve_folder(source)
        if not (self.folder / "config.json").is_file() and (self.folder / ADAPTER).is_file():
            raise _adapter(self.folder)
        self.config: dict[str, Any] = _read_json(self.folder / "config.json")
        self.tensors: dict[str, StoredTensor] = _scan(self.folder) if weights else {}

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """``length`` raw bytes of a tensor from its byte ``start`` on (default: to its end)."""
        stored = self.tensors[name]
        length = stored.nbytes - start if length is None else length
        with stored.file.open("rb", buffering=0) as file:
            file.seek(stored.begin + start)
            data = file.read(length)
        if len(data) != length:
            raise _changed(stored)
        return data

    def chunks(self, name: str, size: int = 1 << 24) -> Iterator[bytes]:
        """All raw bytes of a tensor in pieces of at most ``size``."""
        nbytes = self.tensors[name].nbytes
        for start in range(0, nbytes, size):
            yield self.read(name, start, min(size, nbytes - start))

    def load(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor, in its stored dtype or converted to ``dtype``; on the CPU, its memory its own.

        Raises PrinMixError where the stored dtype is not bf16, fp16 or fp32.
        """
        import numpy as np
        import torch

        stored = self.tensors[name]
        if stored.dtype not in FLOATS:
            raise PrinMixError(
                f"tensor {name} has a dtype that is not supported",
                where=stored.file,
                found=stored.dtype,
                expected=", ".join(FLOATS),
                fix="save the checkpoint in bfloat16, float16 or float32, not quantized",
            )
        # Not through mmap: mapped pages would count as this process's memory until the file is closed.
        data = np.fromfile(stored.file, dtype=np.uint8, count=stored.nbytes, offset=stored.begin)
        if data.size != stored.nbytes:
            raise _changed(stored)
        native = getattr(torch, FLOATS[stored.dtype])
        tensor = torch.from_numpy(data).view(native).view(stored.shape)
        return tensor if dtype is None else tensor.to(dtype)

    def difference(self, base: Checkpoint, name: str) -> torch.Tensor:
        """float32, on the CPU: a tensor of this checkpoint less ``base``'s."""
        import torch

        return self.load(name, torch.float32).sub_(base.load(name))


def resolve_folder(source: str | Path) -> Path:
    """The folder of a checkpoint: ``source`` itself, or its snapshot in the local Hugging Face cache."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    cached = None if folder.exists() else _cached_snapshot(str(source))
    if cached is None:
        raise PrinMixError(
            "there is no such checkpoint folder",
            where=source,
            expected="a folder with config.json and weights, or a model of the local Hugging Face cache",
        )
    return cached


def _cached_snapshot(model_id: str) -> Path | None:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model_id, local_files_only=True))
    except (ImportError, ValueError, OSError):  # the hub's errors, not cached and no id, are among these
        return None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise PrinMixError(
            f"{path.name} is missing", where=path.parent, fix="give a complete Hugging Face checkpoint folder"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PrinMixError("the file is not valid JSON", where=path, found=error) from error
    if not isinstance(value, dict):
        raise PrinMixError("the file is not a JSON object", where=path, found=type(value).__name__)
    return value


def _scan(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's weight files; one file wins over an index, as in transformers."""
    if (folder / SINGLE).is_file():
        return {stored.name: stored for stored in read_header(folder / SINGLE)}
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    index = folder / INDEX
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise PrinMixError("the index has no weight_map", where=index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise PrinMixError(
                "a shard that the index names is missing",
                where=folder / shard,
                fix="copy or download the checkpoint again, with all its files",
            )
        for stored in read_header(folder / shard):
            if weight_map.get(stored.name) != shard:
                raise PrinMixError(
                    f"tensor {stored.name} is in a shard but the index does not say so",
                    where=folder / shard,
                    found=weight_map.get(stored.name, "no entry"),
                    expected=f"an entry for it in {INDEX}",
                    fix="copy or download the checkpoint again: index and shards are of different versions",
                )
            tensors[stored.name] = stored
    if missing := sorted(set(weight_map) - set(tensors)):
        raise PrinMixError(
            f"the index names {len(missing)} tensor(s) that no shard holds", where=index, found=brief(missing)
        )
    return tensors


def _no_weights(folder: Path) -> PrinMixError:
    if (folder / ADAPTER).is_file():
        return _adapter(folder)
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        return PrinMixError(
            "the weights are pickled, and pickles can run code when they are read",
            where=folder,
            found=brief(pickled),
            expected=f"{SINGLE}, or shards with {INDEX}",
            fix="load it with transformers and save it again: save_pretrained() writes safetensors",
        )
    return PrinMixError(
        "there are no weights here", where=folder, expected=f"{SINGLE}, or shards with {INDEX}"
    )


def _adapter(folder: Path) -> PrinMixError:
    return PrinMixError(
        "this is an adapter, not a full checkpoint",
        where=folder,
        fix="to compress a LoRA adapter give it with --from-lora; elsewhere merge it into its base first",
    )


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, checked against the file's real size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise _damaged(file, f"a header of {length} bytes in a file of {size} bytes")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        start = 8 + length
        tensors = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors.append(
                StoredTensor(name, entry["dtype"], tuple(entry["shape"]), file, start + begin, start + end)
            )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise _damaged(file, f"a header that cannot be read ({error})") from error
    for stored in tensors:
        expected = stored.numel * ITEM_BYTES.get(stored.dtype, 0)
        if stored.dtype in ITEM_BYTES and stored.nbytes != expected:
            raise _damaged(file, f"{stored.nbytes} bytes for {stored.name}, its shape needs {expected}")
    end = max((stored.end for stored in tensors), default=start)
    if end != size:
        raise _damaged(file, f"{size} bytes, its header tells of {end}")
    return tensors


def brief(names: list[str], limit: int = 5) -> str:
    """The first few of ``names``, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _damaged(file: Path, found: str) -> PrinMixError:
    return PrinMixError(
        "the file is truncated or not a safetensors file",
        where=file,
        found=found,
        fix="copy or download it again",
    )


def _changed(stored: StoredTensor) -> PrinMixError:
    return PrinMixError(
        f"the file ended inside tensor {stored.name}",
        where=stored.file,
        fix="do not change it while it is in use",
    )

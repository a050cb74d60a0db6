"""Reading and writing a delta folder: prinmix_config.json + delta.safetensors (docs/format.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from pydantic import ValidationError

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import HEAD, Checkpoint, brief
from vllm_prinmix.format.schema import CONFIG_FILE, FORMAT_VERSION, WEIGHTS_FILE, DeltaConfig, Exact, Weights

if TYPE_CHECKING:
    import torch

RECOMPRESS = "compress the fine-tune again, or copy the delta folder again from where it is whole"


@dataclass(frozen=True)
class Delta:
    """A delta folder read and checked: its description and its tensors (on the CPU)."""

    folder: Path
    config: DeltaConfig
    tensors: dict[str, torch.Tensor]  # uint8 payloads; exact tensors in their own dtype


def config_checksum(fields: Mapping[str, Any]) -> str:
    """XXH3-128 (hex) of the config's fields but `checksum`, as compact JSON with sorted keys."""
    body = {k: v for k, v in fields.items() if k != "checksum"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def write_delta(folder: Path, config: DeltaConfig, tensors: Mapping[str, torch.Tensor]) -> DeltaConfig:
    """Write both files into an existing ``folder``; the config goes last and with real size and checksum.

    ``config.weights`` is replaced by what was written. Raises OSError (a full disk, for one).
    """
    from safetensors.torch import save_file

    path = folder / WEIGHTS_FILE
    # One key only: safetensors writes several in random order, and the same delta must be the same bytes.
    save_file(dict(tensors), path, metadata={"prinmix_format_version": str(FORMAT_VERSION)})
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
        os.fsync(file.fileno())
    weights = Weights(bytes=path.stat().st_size, xxh3_128=digest.hexdigest())
    config = config.model_copy(update={"weights": weights})
    fields = config.model_dump(mode="json")
    fields["checksum"] = config_checksum(fields)
    with (folder / CONFIG_FILE).open("w") as out:
        json.dump(fields, out, indent=1)
        out.write("\n")
        out.flush()
        os.fsync(out.fileno())
    return config


def read_config(folder: Path) -> DeltaConfig:
    """prinmix_config.json, checked. Raises PrinMixError naming the file and what is wrong with it."""
    path = Path(folder) / CONFIG_FILE
    if path.exists() and not path.is_file():
        raise PrinMixError("the delta's description is not a file", where=path, fix=RECOMPRESS)
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PrinMixError(
            "not a delta folder" if Path(folder).is_dir() else "the delta folder does not exist",
            where=folder,
            expected=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            fix="make one with `prinmix compress`",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise PrinMixError(
            "the delta's description cannot be read", where=path, found=error, fix=RECOMPRESS
        ) from error
    if not isinstance(fields, dict):
        raise PrinMixError("the delta's description is not a JSON object", where=path, fix=RECOMPRESS)
    version = fields.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise PrinMixError(
            "unknown delta format version",
            where=path,
            found=version,
            expected=FORMAT_VERSION,
            fix="install the vllm-prinmix release that wrote it, or compress again with this one",
        )
    checksum = fields.pop("checksum", None)
    if checksum != config_checksum(fields):
        raise PrinMixError(
            "the delta's description is damaged: its checksum does not fit",
            where=path,
            found=checksum,
            expected=config_checksum(fields),
            fix=RECOMPRESS,
        )
    try:
        return DeltaConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise PrinMixError(
            "the delta's description is not valid",
            where=f"{path}: {at}",
            found=f"{first['msg']} ({error.error_count()} in all)",
            fix="install the vllm-prinmix release that wrote it, or compress again with this one",
        ) from None


def check_weights_size(folder: Path, config: DeltaConfig) -> Path:
    """The path of delta.safetensors, when it is there and has the recorded size; a cheap check (one stat)."""
    path = Path(folder) / WEIGHTS_FILE
    try:
        size = path.stat().st_size
    except OSError as error:
        raise PrinMixError(
            "the delta's weight file cannot be read", where=path, found=error.strerror, fix=RECOMPRESS
        ) from error
    if size != config.weights.bytes:
        raise PrinMixError(
            "the delta's weight file is truncated or was changed",
            where=path,
            found=f"{size} bytes",
            expected=f"{config.weights.bytes} bytes",
            fix=RECOMPRESS,
        )
    return path


def describe(folder: Path) -> Delta:
    """A delta without its weights: packed tensors on the meta device, exact ones full of zeros.

    Raises PrinMixError as `read_config` does.
    """
    import torch

    from vllm_prinmix.format.payload import payload_bytes

    config = read_config(folder)
    tensors = {}
    for name, spec in config.modules.items():
        if isinstance(spec, Exact):
            tensors[name] = torch.zeros(spec.shape)
        else:
            tensors[name] = torch.empty(payload_bytes(spec), dtype=torch.uint8, device="meta")
    return Delta(Path(folder), config, tensors)


def read_delta(folder: Path) -> Delta:
    """Read both files, compare sizes and checksums, and match every tensor with its description.

    One read of the file; raises PrinMixError (missing, truncated, damaged, unknown or unmatched tensors).
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from vllm_prinmix.format.payload import payload_bytes, tables

    folder = Path(folder)
    config = read_config(folder)
    path = check_weights_size(folder, config)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PrinMixError(
            "the delta's weight file cannot be read", where=path, found=error.strerror, fix=RECOMPRESS
        ) from error
    found = xxhash.xxh3_128_hexdigest(data)
    if found != config.weights.xxh3_128:
        raise PrinMixError(
            "the delta's weight file is damaged: its checksum does not fit",
            where=path,
            found=found,
            expected=config.weights.xxh3_128,
            fix=RECOMPRESS,
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise PrinMixError("not a safetensors file", where=path, found=error, fix=RECOMPRESS) from error
    if unmatched := sorted(set(tensors) ^ set(config.modules)):
        raise PrinMixError(
            "tensors and description name different modules",
            where=path,
            found=", ".join(unmatched[:5]),
            fix=RECOMPRESS,
        )
    for name, spec in config.modules.items():
        tensor = tensors[name]
        if isinstance(spec, Exact):
            found_is, expected = (
                (tuple(tensor.shape), tensor.dtype),
                (tuple(spec.shape), getattr(torch, spec.dtype)),
            )
        else:
            found_is, expected = (tuple(tensor.shape), tensor.dtype), ((payload_bytes(spec),), torch.uint8)
        if found_is != expected:
            raise PrinMixError(
                "a tensor is not as described",
                where=f"{path}: {name}",
                found=found_is,
                expected=expected,
                fix=RECOMPRESS,
            )
        numbers = [tensor] if isinstance(spec, Exact) else tables(spec, tensor)
        if not all(bool(torch.isfinite(n).all()) for n in numbers):
            raise PrinMixError(
                "a tensor has NaN or infinite numbers", where=f"{path}: {name}", fix=RECOMPRESS
            )
    return Delta(folder, config, tensors)


def check_accounts(config: DeltaConfig, base: Checkpoint, where: object) -> None:
    """Every tensor of ``base`` is stored or called unchanged, once, in its shape; no other is.

    Raises PrinMixError naming the tensors. A copy of tied embeddings under lm_head and old checkpoints'
    rotary tables are no weights.
    """
    stored, unchanged = set(config.modules), set(config.unchanged)
    names = {name for name in base.tensors if not name.endswith(".rotary_emb.inv_freq")}
    if base.config.get("tie_word_embeddings") is not False and HEAD not in stored | unchanged:
        names.discard(HEAD)
    for found, what in (
        (stored & unchanged, "tensors are both stored and unchanged"),
        ((stored | unchanged) - names, "the base has no such tensors"),
        (names - (stored | unchanged), "the delta does not account for tensors of the base"),
    ):
        if found:
            raise PrinMixError(what, where=where, found=brief(sorted(found)), fix=RECOMPRESS)
    for name, spec in config.modules.items():
        if tuple(spec.shape) != base.tensors[name].shape:
            raise PrinMixError(
                f"{name} has another shape than in the base",
                where=where,
                found=tuple(spec.shape),
                expected=base.tensors[name].shape,
            )


def version(folder: Path) -> str:
    """Content version of a delta (12 hex digits): another content under the same name has another one."""
    try:
        return sha256((Path(folder) / CONFIG_FILE).read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise PrinMixError("the delta folder cannot be read", where=folder, found=error.strerror) from error

"""`prinmix merge`: base + delta as an ordinary Hugging Face checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from vllm_prinmix.compress.partial import check_out, disk_errors, publish
from vllm_prinmix.compress.prepare import progress_bar
from vllm_prinmix.compress.sidefiles import copy, present
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import FLOATS, INDEX, SINGLE, Checkpoint
from vllm_prinmix.format.delta import Delta, check_accounts, read_delta
from vllm_prinmix.format.digest import content_digest
from vllm_prinmix.format.payload import decode
from vllm_prinmix.format.schema import Exact

SHARD_BYTES = 2 << 30  # a shard is held in memory before it is written


def merge(
    base_source: str, delta_folder: Path, out: Path, dtype: str | None, overwrite: bool, console: Console
) -> None:
    """Write base + delta to ``out``, sharded, with config, tokenizer and the tenant's own files.

    Each tensor is ``base.float() + dW`` in float32, then cast to ``dtype`` (bfloat16, float16 or float32;
    None: each tensor as in the base). Raises PrinMixError for a damaged delta, another base, and a full disk.
    """
    check_out(out, overwrite, "config.json", {"--base": base_source, "--delta": str(delta_folder)})
    delta = read_delta(delta_folder)
    base = Checkpoint(base_source)
    check_accounts(delta.config, base, delta.folder)
    check_base(base, delta, console)
    work = out.with_name(out.name + ".partial")
    with disk_errors(work, "the unfinished files have been removed"):
        if work.exists():
            raise PrinMixError(
                "unfinished work is in the way", where=work, fix="remove it, or choose another --out"
            )
        work.mkdir(parents=True)
        try:
            _copy_side_files(base, delta, work, dtype)
            _write_shards(base, delta, work, dtype, console)
            publish(work, out, overwrite)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def check_base(base: Checkpoint, delta: Delta, console: Console) -> None:
    """Raise PrinMixError unless every byte of ``base`` is what the delta was made from."""
    with progress_bar(console) as progress:
        total = sum(stored.nbytes for stored in base.tensors.values())
        task = progress.add_task("Reading the base", total=total)
        found = content_digest(base, lambda name, chunk: progress.advance(task, len(chunk)))
    if found != delta.config.base.content_digest:
        raise PrinMixError(
            "this is not the base that the delta was made from: its digest differs",
            where=base.folder,
            found=found,
            expected=f"{delta.config.base.content_digest} ({delta.config.base.name})",
            fix=f"give the same version of {delta.config.base.name}, or compress again with this base",
        )


def merged_tensor(base: Checkpoint, delta: Delta, name: str) -> torch.Tensor:
    """float32 tensor ``name`` of the merged model: the exact one, base + dW, or the base's own."""
    spec = delta.config.modules.get(name)
    if isinstance(spec, Exact):
        return delta.tensors[name].float()
    weight = base.load(name, torch.float32)
    return weight if spec is None else weight + decode(spec, delta.tensors[name]).dense()


def _merged(base: Checkpoint, delta: Delta, dtype: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    # What is in neither list is no weight: a copy of tied embeddings, or old rotary tables.
    accounted = {*delta.config.modules, *delta.config.unchanged}
    for name, stored in base.tensors.items():
        if name not in accounted:
            continue
        target = dtype or FLOATS[stored.dtype]
        yield name, merged_tensor(base, delta, name).to(getattr(torch, target)).contiguous()


def _write_shards(base: Checkpoint, delta: Delta, folder: Path, dtype: str | None, console: Console) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if pending:
            shards.append(list(pending))
            save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
            pending.clear()

    total = 0
    with progress_bar(console) as progress:
        task = progress.add_task("Merging", total=sum(stored.numel for stored in base.tensors.values()))
        for name, tensor in _merged(base, delta, dtype):
            if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > SHARD_BYTES:
                flush()
            pending[name] = tensor
            total += tensor.nbytes
            progress.advance(task, tensor.numel())
        flush()
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def _copy_side_files(base: Checkpoint, delta: Delta, folder: Path, dtype: str | None) -> None:
    """Config, tokenizer and generation settings of the base, or the tenant's own."""
    config: dict[str, Any] = dict(base.config)
    if dtype is not None:
        for key in ("torch_dtype", "dtype"):
            config.pop(key, None)
        config["dtype"] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for source in (base.folder, delta.folder):
        copy(source, present(source), folder)

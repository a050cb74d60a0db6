"""The worker's side: deltas in host memory, tenants in slots, and the map of a batch's rows to tenants.

Stands in for vLLM's LoRA manager in the model runner. What can fail (disk, checksum, shapes) happens in
`update_host`, on a thread of its own; `set_active_adapters`, which runs inside a step, never touches the
disk and never raises for a tenant.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_prinmix import ops
from vllm_prinmix.backend import BASE, Backend
from vllm_prinmix.compat import resolve
from vllm_prinmix.cpu_backend import CpuBackend
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format import delta as delta_files
from vllm_prinmix.loading import cut_to_rank
from vllm_prinmix.sites import attach
from vllm_prinmix.tenants import FIRST_ID, Tenant, check_version, split_path

logger = resolve("init_logger")("vllm.prinmix")


class DeltaManager:
    """One per worker process. model: the loaded base. Host memory is bounded by the scheduler."""

    def __init__(self, model: nn.Module, vllm_config: Any, device: torch.device) -> None:
        config = vllm_config.model_config
        slots = vllm_config.lora_config.max_loras
        tenants = list(vllm_config.lora_config.catalog.tenants.values())
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.backend = backend_for(device, slots, rows, config.dtype)
        ops.use(self.backend)
        tied = bool(getattr(config.hf_text_config, "tie_word_embeddings", False))
        self.modules = attach(model, self.backend, tied)
        self.backend.reserve(cut_to_rank(delta, self.modules) for delta in _descriptions(tenants))
        self.backend.warm_up()
        if size := self.backend.slot_bytes:
            packed = max(tenant.packed_bytes for tenant in tenants)
            share = f"{size / packed:.2f} times the largest delta's file"
            logger.info("PrinMix: %d slots of %.1f MB on this device, %s", slots, size / 1e6, share)
        self._host: dict[int, Any] = {}
        self._loading: dict[int, Future[Any]] = {}
        self._active: OrderedDict[int, int] = OrderedDict()  # id -> slot, least recently used first
        self._free = list(range(slots))
        self._warmup: set[int] = set()
        self._thread = ThreadPoolExecutor(1, "prinmix-load", initializer=leave_worker_cores)

    # ---- host memory, as the scheduler says

    def update_host(self, load: list[Any], drop: list[int]) -> tuple[set[int], dict[int, str]]:
        """Start loading tenants and drop others: (ids in host memory now, id -> why its load failed)."""
        for number in drop:
            self.remove_adapter(number)
        for request in load:
            if request.lora_int_id not in self._host:
                self._loading[request.lora_int_id] = self._thread.submit(self._load, request)
        failed = {}
        for number, future in list(self._loading.items()):
            if future.done():
                del self._loading[number]
                error = future.exception()
                if error is None:
                    self._host[number] = future.result()
                else:
                    failed[number] = str(error) if isinstance(error, PrinMixError) else repr(error)
        return set(self._host), failed

    def _load(self, request: Any) -> Any:
        folder, version = split_path(request.lora_path)
        delta = delta_files.read_delta(folder)
        check_version(folder, version)
        return self.backend.prepare(cut_to_rank(delta, self.modules))

    # ---- one step

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Bring the batch's tenants into slots and note which rows are whose."""
        # Not those of ``requests``: vLLM puts them into a set, in which two versions of a tenant are one.
        present = set(mapping.index_mapping) | set(mapping.prompt_mapping)
        numbers = sorted(int(n) for n in present if n >= FIRST_ID)
        for number in numbers:
            if number in self._active:
                self._active.move_to_end(number)
        for number in numbers:
            if number not in self._active:
                self._activate(number, keep=set(numbers))
        tokens, samples = (self._slots(m) for m in (mapping.index_mapping, mapping.prompt_mapping))
        # Warm-up's ids count, although they have no slot: see `Backend.active`.
        self.backend.set_batch(tokens, samples, active=any(mapping.index_mapping))

    def _activate(self, number: int, keep: set[int]) -> None:
        if not self._free:
            # There are as many slots as distinct tenants in a batch, so one is always out of use.
            self._deactivate(next(n for n in self._active if n not in keep))
        slot = self._active[number] = self._free.pop()
        self.backend.activate(slot, self._host[number])

    def _deactivate(self, number: int) -> None:
        slot = self._active.pop(number)
        self.backend.deactivate(slot)
        self._free.append(slot)

    def _slots(self, numbers: tuple[int, ...]) -> np.ndarray:
        """int64 [rows]: the slot of each row, by its tenant's id; ids below `FIRST_ID` are no tenant's."""
        present, inverse = np.unique(np.asarray(numbers, dtype=np.int64), return_inverse=True)
        # A tenant without a slot is a KeyError: its rows would be answered by the base.
        slots = [self._active[n] if n >= FIRST_ID else BASE for n in present.tolist()]
        return np.array(slots, dtype=np.int64)[inverse]

    # ---- the rest of vLLM's adapter manager protocol

    def add_adapter(self, request: Any) -> bool:
        """vLLM calls this for adapters loaded by hand at run time; tenants come by their folder."""
        if request.lora_int_id in self._host or request.lora_int_id in self._warmup:
            return True
        raise PrinMixError(
            "a tenant is not added by a request",
            where=request.lora_name,
            fix="put its delta into the folder given to --deltas: it is found there once it is asked for",
        )

    def remove_adapter(self, adapter_id: int) -> bool:
        if adapter_id in self._active:
            self._deactivate(adapter_id)
        self._warmup.discard(adapter_id)
        return self._host.pop(adapter_id, None) is not None

    def remove_all_adapters(self) -> None:
        """Called after warm-up. Host memory stays: the scheduler keeps account of it."""
        for number in list(self._active):
            self._deactivate(number)
        self._warmup.clear()
        nothing = np.empty(0, dtype=np.int64)
        self.backend.set_batch(nothing, nothing, active=False)

    def list_adapters(self) -> set[int]:
        return set(self._host) | self._warmup

    def pin_adapter(self, adapter_id: int) -> bool:
        return adapter_id in self._host

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        self._warmup.add(request.lora_int_id)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        return False


def backend_for(device: torch.device, slots: int, rows: int, dtype: torch.dtype) -> Backend:
    """``rows``: of a batch, at most."""
    if device.type == "cpu":
        return CpuBackend(slots)
    # Triton is there only where vLLM has a GPU.
    from vllm_prinmix.triton_backend import TritonBackend

    return TritonBackend(slots, rows, dtype, device)


def _descriptions(tenants: Iterable[Tenant]) -> Iterator[delta_files.Delta]:
    """The tenants' deltas without their weights; without those that were broken since the start."""
    for tenant in tenants:
        try:
            yield delta_files.describe(Path(tenant.folder))
        except PrinMixError as error:
            logger.warning("PrinMix: tenant %s cannot be loaded: %s", tenant.name, error)


def leave_worker_cores() -> None:
    """Move this thread off the cores that vLLM bound its worker to on the CPU, if the engine has others."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(OSError):  # the engine is gone, or may not be looked at
            others = os.sched_getaffinity(os.getppid()) - os.sched_getaffinity(0)
            if others:
                os.sched_setaffinity(0, others)


@contextmanager
def prompt_rows(hidden_states: torch.Tensor) -> Iterator[None]:
    """While prompt log-probs are computed, logits are of views of ``hidden_states``: one row per token."""
    assert ops.backend is not None
    ops.backend.prompt_hidden = hidden_states
    try:
        yield
    finally:
        ops.backend.prompt_hidden = None


def with_prompt_rows(function: Callable, parameter: str = "hidden_states") -> Callable:
    """Wrap a model runner's function that computes prompt log-probs from its ``hidden_states``."""
    import functools
    import inspect

    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with prompt_rows(signature.bind(*args, **kwargs).arguments[parameter]):
            return function(*args, **kwargs)

    return wrapped

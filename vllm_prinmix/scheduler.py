"""The scheduler's part: requests of a cold tenant wait while its delta is loaded off the engine loop.

The scheduler alone decides which tenants are in host memory. Workers load and drop what they are told and
never evict by themselves, so no rank can disagree and no step ever finds its delta gone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from concurrent.futures import Future
from typing import Any

from vllm_prinmix.compat import resolve

Scheduler: Any = resolve("Scheduler")
AsyncScheduler: Any = resolve("AsyncScheduler")
FinishReason: Any = resolve("FinishReason")

logger = resolve("init_logger")("vllm.prinmix")

POLL_SECONDS = 0.002  # between polls of the workers while nothing else can run
_executors: list[Any] = []


def record_executor(executor: Any) -> None:
    """Remember an executor of this process: vLLM hands its scheduler none."""
    _executors.append(executor)


def load_deltas(worker: Any, load: list, drop: list[int]) -> tuple[set[int], dict[int, str]]:
    """Runs in every worker: start loads, drop tenants; (ids in host memory, id -> why a load failed)."""
    inner = getattr(worker, "worker", worker)
    return inner.model_runner.lora_manager.update_host(load, drop)


class HoldBack:
    """Mixin over vLLM's schedulers: a waiting request is ready only once its tenant is in host memory."""

    # Provided by vLLM's scheduler.
    running: list
    vllm_config: Any
    lora_config: Any
    grammar_compile_error_reqs: set[str]

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        self._resident: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._loading: dict[int, Any] = {}
        self._wanted: OrderedDict[int, Any] = OrderedDict()
        self._ready: set[int] = set()  # tenants with a request that could run in this step
        self._drop: list[int] = []  # what some rank may still hold although another failed to load it
        self._failed: dict[int, str] = {}  # reasons, kept until the waiting requests were told
        self._reasons: dict[str, str] = {}  # request id -> why it failed
        self._poll: Future | None = None

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        if not super()._handle_blocked_waiting_request(request):  # type: ignore[misc]
            return False
        tenant = request.lora_request
        if tenant is None:
            return True
        number = tenant.lora_int_id
        if number in self._resident:
            self._resident.move_to_end(number)
            self._ready.add(number)
            return True
        if number in self._failed:
            # vLLM's own way to end a request that cannot be run; the reason follows in update_from_output.
            self._reasons[request.request_id] = f"tenant {tenant.lora_name}: {self._failed[number]}"
            self.grammar_compile_error_reqs.add(request.request_id)
        elif number not in self._loading:
            self._wanted[number] = tenant
        return False

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._collect()
        # Only requests that wait right now are to be loaded for: an aborted one wants nothing any more.
        self._wanted.clear()
        self._ready.clear()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._failed.clear()
        self._request_loads()
        if self._poll is not None and output.total_num_scheduled_tokens == 0:
            time.sleep(POLL_SECONDS)
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        if self._reasons:
            for client in outputs.values():
                for output in client.outputs:
                    if output.finish_reason == FinishReason.ERROR:
                        # The engine's protocol has no field for an error's text; stop_reason is unused here.
                        output.stop_reason = self._reasons.pop(output.request_id, output.stop_reason)
        return outputs

    def _collect(self) -> None:
        """Take in what the workers answered, if they did."""
        if self._poll is None or not self._poll.done():
            return
        answers = self._poll.result()
        self._poll = None
        everywhere = set.intersection(*(resident for resident, _ in answers))
        for _, failed in answers:
            self._failed.update(failed)
        for number, reason in self._failed.items():
            logger.error("PrinMix: tenant %s cannot be loaded: %s", self._loading[number].lora_name, reason)
        for number in list(self._loading):
            if number in self._failed:
                del self._loading[number]
                self._drop.append(number)
            elif number in everywhere:
                del self._loading[number]
                self._resident[number] = None

    def _request_loads(self) -> None:
        """Ask the workers to load what is wanted, as far as host memory allows, or poll what is under way."""
        if self._poll is not None or not (self._wanted or self._loading):
            return
        in_use = {r.lora_request.lora_int_id for r in self.running if r.lora_request is not None}
        # A tenant whose request only waits for a slot stays: evicting it would load it over and over.
        idle = [number for number in self._resident if number not in in_use | self._ready]
        load, drop = [], self._drop
        self._drop = []
        for number, tenant in self._wanted.items():
            if len(self._resident) + len(self._loading) >= self.lora_config.max_cpu_loras:
                if not idle:
                    break
                drop.append(idle.pop(0))
                del self._resident[drop[-1]]
            load.append(tenant)
            self._loading[number] = tenant
        executor = next(e for e in _executors if e.vllm_config is self.vllm_config)
        self._poll = executor.collective_rpc(load_deltas, args=(load, drop), non_block=True)


class PrinMixScheduler(HoldBack, Scheduler):
    """vLLM's scheduler with cold tenants held back."""


class PrinMixAsyncScheduler(HoldBack, AsyncScheduler):
    """vLLM's asynchronous scheduler with cold tenants held back."""

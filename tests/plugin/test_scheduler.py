"""Holding back cold tenants, with vLLM's scheduler and executor played by a few lines."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_prinmix import scheduler
from vllm_prinmix.scheduler import HoldBack


class Executor:
    """Worker processes: `ready` and `failed` are what they will report once asked."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.calls: list[tuple[list[str], list[int]]] = []
        self.host: set[int] = set()
        self.failing: dict[int, str] = {}
        self.pending: Future | None = None

    def collective_rpc(self, function: Any, args: tuple, non_block: bool) -> Future:
        assert non_block
        load, drop = args
        self.calls.append(([r.lora_name for r in load], list(drop)))
        self.host -= set(drop)
        self.host |= {r.lora_int_id for r in load if r.lora_int_id not in self.failing}
        self.pending = Future()
        return self.pending

    def answer(self, ready: set[int] | None = None, failed: dict[int, str] | None = None) -> None:
        assert self.pending is not None
        host = self.host if ready is None else ready
        self.pending.set_result([(set(host), dict(failed or {})), (set(self.host), {})])


class Base:
    """vLLM's scheduler: schedules every waiting request that is ready."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config, self.lora_config = vllm_config, vllm_config.lora_config
        self.running: list[Any] = []
        self.waiting: list[Any] = []
        self.grammar_compile_error_reqs: set[str] = set()
        self.limit = 99

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        return True

    def schedule(self) -> Any:
        scheduled = 0
        for request in list(self.waiting):
            if self._handle_blocked_waiting_request(request) and len(self.running) < self.limit:
                self.waiting.remove(request)
                self.running.append(request)
                scheduled += 1
        return SimpleNamespace(total_num_scheduled_tokens=scheduled)

    def update_from_output(self) -> Any:
        failed, self.grammar_compile_error_reqs = self.grammar_compile_error_reqs, set()
        self.waiting = [r for r in self.waiting if r.request_id not in failed]
        error = scheduler.FinishReason.ERROR
        outputs = [SimpleNamespace(request_id=i, finish_reason=error, stop_reason=None) for i in failed]
        return {0: SimpleNamespace(outputs=outputs)}


class Scheduler(HoldBack, Base):
    pass


def request(name: str | None, number: int = 0) -> Any:
    tenant = SimpleNamespace(lora_name=name, lora_int_id=number) if name else None
    return SimpleNamespace(request_id=f"{name}-{id(tenant)}", lora_request=tenant)


@pytest.fixture
def pair() -> tuple[Scheduler, Executor]:
    config = SimpleNamespace(lora_config=SimpleNamespace(max_cpu_loras=2))
    executor = Executor(config)
    scheduler.record_executor(executor)
    return Scheduler(config), executor


def test_base_requests_never_wait(pair: tuple[Scheduler, Executor]) -> None:
    sched, executor = pair
    sched.waiting = [request(None)]
    assert sched.schedule().total_num_scheduled_tokens == 1
    assert executor.calls == []


def test_a_cold_tenant_waits_and_others_do_not(pair: tuple[Scheduler, Executor]) -> None:
    sched, executor = pair
    sched.waiting = [request("a", 1), request(None)]
    sched.schedule()
    assert [r.lora_request for r in sched.running] == [None]
    assert executor.calls == [(["a"], [])]
    sched.schedule()
    assert len(executor.calls) == 1, "one question at a time"
    executor.answer(ready=set())
    sched.schedule()
    assert executor.calls[1:] == [([], [])], "still loading: asked again, not loaded again"
    executor.answer()
    sched.schedule()
    assert len(sched.running) == 2


def test_ready_means_ready_on_every_rank(pair: tuple[Scheduler, Executor]) -> None:
    sched, executor = pair
    sched.waiting = [request("a", 1)]
    sched.schedule()
    executor.answer(ready=set())  # the other rank reports it as loaded
    sched.schedule()
    assert sched.running == []


def test_the_least_recently_used_idle_tenant_makes_room(pair: tuple[Scheduler, Executor]) -> None:
    sched, executor = pair
    sched.waiting = [request("a", 1), request("b", 2)]
    sched.schedule()
    executor.answer()
    sched.schedule()
    sched.running = []
    sched.waiting = [request("a", 1)]
    sched.schedule()
    sched.running = []
    sched.waiting = [request("c", 3)]
    sched.schedule()
    assert executor.calls[-1] == (["c"], [2]), "b was used before a"


def test_a_tenant_in_use_is_never_dropped(pair: tuple[Scheduler, Executor]) -> None:
    sched, executor = pair
    sched.waiting = [request("a", 1), request("b", 2)]
    sched.schedule()
    executor.answer()
    sched.schedule()
    sched.waiting = [request("c", 3)]
    calls = len(executor.calls)
    for _ in range(3):
        sched.schedule()
        if executor.pending and not executor.pending.done():
            executor.answer()
    assert all(call == ([], []) for call in executor.calls[calls:])
    sched.running.pop(0)
    sched.schedule()
    assert executor.calls[-1] == (["c"], [1])


def test_a_tenant_that_waits_for_a_slot_is_not_dropped(pair: tuple[Scheduler, Executor]) -> None:
    sched, executor = pair
    sched.limit = 0
    sched.waiting = [request("a", 1), request("b", 2)]
    sched.schedule()
    executor.answer()
    sched.waiting.append(request("c", 3))
    sched.schedule()
    assert executor.calls[-1] != (["c"], [1])
    assert set(sched._resident) == {1, 2}


def test_a_failed_load_ends_its_requests_with_the_reason(pair: tuple[Scheduler, Executor]) -> None:
    sched, executor = pair
    executor.failing[1] = "disk on fire"
    sched.waiting = [request("a", 1), request("a", 1), request("b", 2)]
    sched.schedule()
    executor.answer(failed={1: "disk on fire"})
    sched.schedule()
    outputs = sched.update_from_output()[0].outputs
    assert [o.stop_reason for o in outputs] == ["tenant a: disk on fire"] * 2
    assert [r.lora_request.lora_name for r in sched.running] == ["b"]


def test_a_failed_tenant_is_tried_again_and_dropped_where_it_loaded(
    pair: tuple[Scheduler, Executor],
) -> None:
    sched, executor = pair
    sched.waiting = [request("a", 1)]
    sched.schedule()
    executor.answer(failed={1: "disk on fire"})
    sched.schedule()
    sched.update_from_output()
    sched.waiting = [request("a", 1)]
    sched.schedule()
    assert executor.calls[-1] == (["a"], [1]), "another rank may still hold the failed load"
    executor.answer()
    sched.schedule()
    assert len(sched.running) == 1


def test_an_aborted_request_leaves_no_load_behind(pair: tuple[Scheduler, Executor]) -> None:
    sched, executor = pair
    sched.running = [request("x", 8), request("y", 9)]
    sched._resident.update({8: None, 9: None})
    sched.waiting = [request("a", 1)]
    sched.schedule()
    sched.waiting = []
    sched.running = []
    sched.schedule()
    assert all(load == [] for load, _ in executor.calls)

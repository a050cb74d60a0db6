"""Where the matrices of a run are compressed: here, one after the other, or on a Ray cluster."""

from __future__ import annotations

import logging
import os
import socket
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.task import Task
from vllm_prinmix.errors import PrinMixError

T = TypeVar("T")
# A matrix's task, dW, metric and correction: the arguments of `task.solve`.
Tasks = Iterable[tuple[Task, torch.Tensor, Hessian, torch.Tensor | None]]
# A function of a module, with which it travels by name: `task.solve`, `task.survey`.
Work = Callable[[Task, torch.Tensor, Hessian, torch.Tensor | None], T]


class Executor(Protocol):
    def map(self, work: Work[T], tasks: Tasks) -> Generator[T]:
        """What ``work`` returns for each task, in any order. Closing it gives up what is not finished."""
        ...


class Serial:
    """Compresses each matrix before the next is asked for."""

    def map(self, work: Work[T], tasks: Tasks) -> Generator[T]:
        for task, dw, hessian, correction in tasks:
            result = work(task, dw, hessian, correction)
            del dw, hessian, correction  # large, and not needed while the next layer runs
            yield result


class OnRay:
    """Compresses matrices on the machines of a Ray cluster, while ``tasks`` goes on to the next.

    A task takes one GPU where ``device`` is CUDA, else as many CPUs as torch has threads here
    (OMP_NUM_THREADS), and computes with that many threads: on machines of one kind, the results are those of
    `Serial`, bit for bit. Tasks under way: as many as the cluster can run at once, and one more. Modules with
    the same `Hessian` that follow one another share one copy of it in the cluster.

    Raises PrinMixError where a task fails, naming its matrix, and where no machine has what a task takes;
    what else is finished by then is yielded first. Raises it for nothing that Ray itself puts right, such as
    a machine that is lost.
    """

    def __init__(self, ray: Any, device: torch.device) -> None:
        self._ray, self._device, self._threads = ray, device.type, torch.get_num_threads()
        self._takes = {"GPU": 1} if device.type == "cuda" else {"CPU": self._threads}
        options = {f"num_{kind.lower()}s": count for kind, count in self._takes.items()}
        self._remote = ray.remote(**options)(_work_there)
        if not self._at_once():
            taken = " and ".join(f"{count} {kind}" for kind, count in self._takes.items())
            raise PrinMixError(
                "no machine of the Ray cluster has what a task takes",
                where="--ray",
                found=[self._of(node) for node in self._nodes()],
                expected=f"{taken} on one machine",
                fix="start `ray` on such a machine"
                + ("" if device.type == "cuda" else ", or set OMP_NUM_THREADS to fewer"),
            )

    def map(self, work: Work[T], tasks: Tasks) -> Generator[T]:
        running: dict[Any, str] = {}
        shared: Any = None  # of the Hessian `last`
        last: weakref.ref[Hessian] | None = None
        try:
            for task, dw, hessian, correction in tasks:
                if last is None or last() is not hessian:
                    shared, last = self._ray.put(_array(hessian.matrix)), weakref.ref(hessian)
                submit = self._remote.options(name=task.name)
                added = None if correction is None else _array(correction)
                place = self._device, self._threads
                reference = submit.remote(work, task, _array(dw), shared, added, *place)
                running[reference] = task.name
                del dw, hessian, correction, added  # the cluster has them now
                while len(running) > self._at_once():
                    yield self._next(running)
            del shared
            while running:
                yield self._next(running)
        except (Exception, KeyboardInterrupt):
            yield from self._finished(running)
            raise
        finally:
            for reference in running:
                self._ray.cancel(reference)

    def _finished(self, running: dict[Any, str]) -> Iterator[Any]:
        """What has succeeded by now, taken out of ``running``."""
        for reference, name in list(running.items()):
            if self._ray.wait([reference], timeout=0)[0]:
                del running[reference]
                with suppress(PrinMixError):
                    yield self._get(reference, name)

    def _next(self, running: dict[Any, str]) -> Any:
        """Waits until a task has ended and takes it out of ``running``."""
        (reference, *_), _ = self._ray.wait(list(running))
        return self._get(reference, running.pop(reference))

    def _get(self, reference: Any, name: str) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise PrinMixError(
                "a module could not be compressed on the Ray cluster",
                where=name,
                found=f"{type(cause).__name__}: {cause}",
                fix="mend that and run the same command again; the modules that are finished are kept",
            ) from error

    def _at_once(self) -> int:
        """Tasks that the cluster, as it is now, can run at the same time."""
        return sum(
            min(int(self._of(node)[kind] // count) for kind, count in self._takes.items())
            for node in self._nodes()
        )

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _of(self, node: dict[str, Any]) -> dict[str, float]:
        """What a machine has of what a task takes."""
        return {kind: node["Resources"].get(kind, 0) for kind in self._takes}


@contextmanager
def on_ray(device: torch.device) -> Iterator[OnRay]:
    """The Ray cluster at RAY_ADDRESS, else the one of this machine, or that this process is connected to.

    Raises PrinMixError where Ray is not installed or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise PrinMixError(
            "--ray needs the package `ray`", found=error, fix="run `pip install 'vllm-prinmix[ray]'`"
        ) from error
    address = os.environ.get("RAY_ADDRESS") or "auto"
    ours = not ray.is_initialized()
    if ours:
        try:
            _connect(ray, address)
        except (OSError, RuntimeError, ValueError) as error:
            raise PrinMixError(
                "no Ray cluster answers",
                where=f"RAY_ADDRESS={address}" if address != "auto" else "--ray",
                found=str(error).splitlines()[0],
                fix="start one (`ray start --head`), or set RAY_ADDRESS to one that runs",
            ) from error
    try:
        yield OnRay(ray, device)
    finally:
        if ours:
            ray.shutdown()


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Arrays go through shared memory to other processes; tensors would be pickled, which is slower."""
    return tensor.cpu().numpy()


def _work_there(
    work: Work[T],
    task: Task,
    dw: np.ndarray,
    metric: np.ndarray,
    correction: np.ndarray | None,
    device: str,
    threads: int,
) -> T:
    """``work`` in a process of the cluster. Shared memory is read-only, hence the copies."""
    torch.set_num_threads(threads)
    change, moments, added = (
        None if array is None else torch.tensor(array, device=device) for array in (dw, metric, correction)
    )
    assert change is not None
    assert moments is not None
    return work(task, change, Hessian(moments), added)


def _connect(ray: Any, address: str) -> None:
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        # Ray itself waits for minutes, and then ends the process.
        socket.create_connection((host, int(port)), timeout=10).close()
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)

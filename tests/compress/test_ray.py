"""`prinmix compress --ray` on a cluster of this machine: the serial run's bytes, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from tests.compress.pairs import Pair
from tests.compress.test_cli import compress_arguments
from tests.compress.test_resume import contents, interrupt
from vllm_prinmix.compress.executor import on_ray
from vllm_prinmix.compress.methods.paper import Paper
from vllm_prinmix.compress.partial import Partial
from vllm_prinmix.errors import PrinMixError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two processes of one thread each, and this process connected to them."""
    with pytest.MonkeyPatch.context() as patch:
        # No token in the home folder, nothing sent anywhere.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=100_000_000,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


class FailsOnce(Paper):
    """`Paper`, which the matrices that read 192 inputs (down_proj) defeat."""

    def compress(self, dw: torch.Tensor, *args: Any) -> Any:
        if dw.shape[1] == 192:
            raise ValueError("no luck with it")
        return super().compress(dw, *args)


@pytest.mark.usefixtures("cluster")
def test_same_bytes_as_the_serial_run(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In this process, whose connection is used, and as a command that connects itself."""
    pair = make_pair()
    compress(pair, tmp_path / "serial")
    shared: list[tuple[int, ...]] = []
    put = ray.put
    monkeypatch.setattr(ray, "put", lambda array: (shared.append(array.shape), put(array))[1])
    compress(pair, tmp_path / "here", ray=True)
    # The embedding's and lm_head's; of each layer those of q/k/v, o, gate/up and down.
    layer = [(128, 128)] * 3 + [(192, 192)]
    assert shared == [(160,), *layer, *layer, (128, 128)]
    compress(pair, tmp_path / "serial-fitted", compensate=True)
    compress(pair, tmp_path / "fitted", compensate=True, ray=True)
    assert contents(tmp_path / "fitted") == contents(tmp_path / "serial-fitted")
    main = "from vllm_prinmix.cli import main; main()"
    arguments = [*compress_arguments(pair, tmp_path / "command"), "--bits", "0,2,3,4,8", "--ray"]
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-c", main, *map(str, arguments)],
        env={**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "serial") == contents(tmp_path / "here") == contents(tmp_path / "command")


@pytest.mark.usefixtures("cluster")
def test_a_failed_task_names_its_module_and_costs_no_other(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair, method = make_pair(), {"bits": (0, 2, 3, 4, 8), "max_active_bits": 4, "solver": "exact"}
    with pytest.raises(
        PrinMixError,
        match=r"could not be .*\[model\.layers\.0\.mlp\.down_proj\.weight\].*ValueError: no luck",
    ):
        compress(pair, tmp_path / "delta", ray=True, method=FailsOnce(**method))
    assert "taken over" in compress(pair, tmp_path / "delta", method=Paper(**method))
    compress(pair, tmp_path / "serial", method=Paper(**method))
    assert contents(tmp_path / "delta") == contents(tmp_path / "serial")


@pytest.mark.usefixtures("cluster")
def test_interrupted_it_keeps_what_is_finished(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = make_pair()
    interrupt(monkeypatch, after=15)
    with pytest.raises(KeyboardInterrupt):
        compress(pair, tmp_path / "delta", ray=True)
    assert "15 tensors are taken over" in compress(pair, tmp_path / "delta")
    compress(pair, tmp_path / "serial")
    assert contents(tmp_path / "delta") == contents(tmp_path / "serial")


@pytest.mark.usefixtures("cluster")
def test_interrupted_while_it_waits(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that the cluster has finished by then is kept."""
    wait, calls = ray.wait, 0

    def interrupted(references: list[Any], **arguments: Any) -> Any:
        nonlocal calls
        if "timeout" in arguments:
            return wait(references, **arguments)
        calls += 1
        if calls == 3:
            wait(references, num_returns=len(references))
            raise KeyboardInterrupt
        return wait(references, **arguments)

    saved: list[str] = []
    save = Partial.save
    monkeypatch.setattr(ray, "wait", interrupted)
    monkeypatch.setattr(
        Partial, "save", lambda self, name, *args: (saved.append(name), save(self, name, *args))
    )
    with pytest.raises(KeyboardInterrupt):
        compress(make_pair(), tmp_path / "delta", ray=True)
    # Two were taken out one by one; three, one more than the cluster has processes, were under way.
    assert len([name for name in saved if name.endswith(("_proj.weight", "embed_tokens.weight"))]) == 5


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("device", "takes"), [("cpu", "3 CPU on one machine"), ("cuda", "1 GPU on one")])
def test_a_cluster_that_is_too_small(device: str, takes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with pytest.raises(PrinMixError, match=takes), on_ray(torch.device(device)):
        pass


def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:1", "nonsense"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(PrinMixError, match=f"no Ray cluster answers.*RAY_ADDRESS={address}"), on_ray(CPU):
            pass


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PrinMixError, match=r"needs the package `ray`.*vllm-prinmix\[ray\]"), on_ray(CPU):
        pass

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vllm_prinmix.compress.quantization.threads import SERIAL, one_thread_if_small


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("size", "threads"), [(1, 1), (SERIAL, 1), (SERIAL + 1, 2)])
def test_small_problems_get_one_thread(size: int, threads: int) -> None:
    with one_thread_if_small(size):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_threads_come_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="broken"), one_thread_if_small(1):
        raise RuntimeError("broken")
    assert torch.get_num_threads() == 2

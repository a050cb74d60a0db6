"""Fixtures: a saved tiny pair, and a run of the compressor on it."""

from __future__ import annotations

import io
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.compress.pairs import (
    Pair,
    build,
    finetune,
    options,
    tiny_config,
    write_calibration,
    write_tokenizer,
)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """On matrices this small, threads only wait for each other, and on a busy machine they wait long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_pair(tmp_path: Path) -> Callable[..., Pair]:
    """``make_pair(architecture, dtype=, finetuned_dtype=, shards=, change=, **config)`` -> a saved Pair."""

    def make(
        architecture: str = "qwen2",
        *,
        dtype: torch.dtype = torch.bfloat16,
        finetuned_dtype: torch.dtype | None = None,
        shard_size: str = "1GB",
        change: Callable[[Any], None] | None = None,
        **settings: Any,
    ) -> Pair:
        pair = Pair(tmp_path / "base", tmp_path / "tuned", tmp_path / "calibration.txt")
        model = build(tiny_config(architecture, **settings), seed=0)
        model.to(dtype).save_pretrained(pair.base, max_shard_size=shard_size)
        (change or (lambda m: finetune(m, seed=1)))(model.float())
        model.to(finetuned_dtype or dtype).save_pretrained(pair.finetuned, max_shard_size=shard_size)
        for folder in (pair.base, pair.finetuned):
            write_tokenizer(folder)
        write_calibration(pair.calibration)
        return pair

    return make


@pytest.fixture
def console() -> Console:
    """Wide, without colours, and kept in memory: ``console.file.getvalue()``."""
    return Console(file=io.StringIO(), width=300)


@pytest.fixture
def compress(console: Console) -> Callable[..., str]:
    """``compress(pair, out, **options)`` -> what it printed."""
    from vllm_prinmix.compress.run import compress as run

    def call(pair: Pair, out: Path, **changes: Any) -> str:
        assert isinstance(console.file, io.StringIO)
        start = len(console.file.getvalue())
        run(options(pair, out, **changes), console)
        return console.file.getvalue()[start:]

    return call


@pytest.fixture
def file_size_limit() -> Callable[[int], AbstractContextManager[None]]:
    """``with file_size_limit(n)``: no file grows beyond n bytes; writes fail as on a full disk."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit

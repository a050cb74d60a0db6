"""Interrupted and failing runs: nothing that looks whole is left, and nothing that was finished is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.compress.pairs import Pair
from vllm_prinmix.compress.partial import Partial
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.delta import read_delta

KILLED_AFTER = 9

# Compresses with the same options as the tests do, and dies by SIGKILL when some modules are finished.
CHILD = """
import os, signal, sys, torch
from pathlib import Path
from rich.console import Console
from tests.compress.pairs import Pair, options
from vllm_prinmix.compress.partial import Partial
from vllm_prinmix.compress.run import compress
torch.set_num_threads(1)
save, count = Partial.save, 0
def counted(self, *args):
    global count
    save(self, *args)
    count += 1
    if count == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
Partial.save = counted
root = Path(sys.argv[1])
pair = Pair(root / "base", root / "tuned", root / "calibration.txt")
compress(options(pair, root / "killed"), Console())
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def compressed_matrices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the modules that this process saved."""
    saved: list[str] = []
    save = Partial.save

    def recorded(self: Partial, name: str, *args: Any) -> None:
        saved.append(name)
        save(self, name, *args)

    monkeypatch.setattr(Partial, "save", recorded)
    return saved


def test_killed_run_resumes_to_the_same_bytes(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    compressed_matrices: list[str],
) -> None:
    pair = make_pair()
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(after=KILLED_AFTER), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert len(list((tmp_path / "killed.partial" / "modules").iterdir())) == KILLED_AFTER
    printed = compress(pair, tmp_path / "killed")
    assert f"{KILLED_AFTER} tensors are taken over" in printed
    resumed = len(compressed_matrices)
    compress(pair, tmp_path / "whole")
    assert len(compressed_matrices) - resumed == resumed + KILLED_AFTER
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not (tmp_path / "killed.partial").exists()


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    save, saved = Partial.save, []

    def counted(self: Partial, name: str, *args: Any) -> None:
        if len(saved) == after:
            monkeypatch.undo()
            raise KeyboardInterrupt
        saved.append(name)
        save(self, name, *args)

    monkeypatch.setattr(Partial, "save", counted)


def test_other_arguments_start_over_only_when_told_to(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = make_pair()
    interrupt(monkeypatch, after=15)
    with pytest.raises(KeyboardInterrupt):
        compress(pair, tmp_path / "delta")
    with pytest.raises(PrinMixError, match=r"unfinished work of other arguments.*other bits, calibration"):
        compress(pair, tmp_path / "delta", bits=(0, 2, 4), samples=3)
    (tmp_path / "delta.partial" / ".run.json.tmp").write_text("left by a kill")
    printed = compress(pair, tmp_path / "delta", bits=(0, 2, 4), samples=3, overwrite=True)
    assert "taken over" not in printed
    compress(pair, tmp_path / "fresh", bits=(0, 2, 4), samples=3)
    assert contents(tmp_path / "delta") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("size", [1000, 5000, 25000], ids=["first file", "a module", "the delta"])
def test_full_disk_is_one_clear_error_and_loses_nothing(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    file_size_limit: Callable[[int], Any],
    size: int,
) -> None:
    pair = make_pair()
    with (
        file_size_limit(size),
        pytest.raises(PrinMixError, match=r"the disk is full.*finished are kept") as caught,
    ):
        compress(pair, tmp_path / "delta")
    assert str(tmp_path / "delta.partial") in str(caught.value)
    assert not (tmp_path / "delta").exists()
    finished = len(list((tmp_path / "delta.partial" / "modules").glob("*.safetensors")))
    printed = compress(pair, tmp_path / "delta")
    assert ("taken over" in printed) == (finished > 0)
    read_delta(tmp_path / "delta")
    compress(pair, tmp_path / "fresh")
    assert contents(tmp_path / "delta") == contents(tmp_path / "fresh")


def test_damaged_finished_module_is_named(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = make_pair()
    interrupt(monkeypatch, after=12)
    with pytest.raises(KeyboardInterrupt):
        compress(pair, tmp_path / "delta")
    module = sorted((tmp_path / "delta.partial" / "modules").iterdir())[0]
    os.truncate(module, 50)
    with pytest.raises(PrinMixError, match=r"finished module .* is damaged") as caught:
        compress(pair, tmp_path / "delta")
    assert str(module) in str(caught.value)


def test_foreign_folder_in_the_way_is_left_alone(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair()
    (tmp_path / "delta.partial").mkdir()
    (tmp_path / "delta.partial" / "thesis.txt").write_text("x")
    with pytest.raises(PrinMixError, match=r"holds something else.*thesis\.txt"):
        compress(pair, tmp_path / "delta")
    assert (tmp_path / "delta.partial" / "thesis.txt").read_text() == "x"


def test_two_runs_do_not_share_a_folder(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair()
    other = Partial(tmp_path / "delta", {"some": "key"})
    with pytest.raises(PrinMixError, match="another `prinmix compress` is writing there"):
        compress(pair, tmp_path / "delta")
    other.close()
    compress(pair, tmp_path / "delta")


def test_a_damaged_record_of_the_run_is_no_traceback(
    make_pair: Callable[..., Pair],
    compress: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = make_pair()
    interrupt(monkeypatch, after=12)
    with pytest.raises(KeyboardInterrupt):
        compress(pair, tmp_path / "delta")
    (tmp_path / "delta.partial" / "run.json").write_text("{")
    with pytest.raises(PrinMixError, match="unfinished work of other arguments"):
        compress(pair, tmp_path / "delta")


def test_overwrite_replaces_nothing_but_a_delta(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair()
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("x")
    for out in (home, home / "thesis.txt"):
        with pytest.raises(PrinMixError, match="something else than what --overwrite may replace"):
            compress(pair, out, overwrite=True)
    for out in (pair.base, pair.finetuned, pair.base.parent):
        with pytest.raises(PrinMixError, match="the output would replace an input"):
            compress(pair, out, overwrite=True)
    assert (home / "thesis.txt").read_text() == "x"


def test_the_base_itself_is_no_finetune(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair = make_pair()
    same = Pair(pair.base, pair.base, pair.calibration)
    with pytest.raises(PrinMixError, match="equals the base, bit for bit"):
        compress(same, tmp_path / "delta")

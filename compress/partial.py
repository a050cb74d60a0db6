"""OUT.partial: the a run's finished modules, so that it can resume, and a full disk loses nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.schema import Module

_MODULE: TypeAdapter[Any] = TypeAdapter(Module)
RUN_FILE = "run.json"
LIMITS_FILE = "limits.json"


class Partial:
    """An opened OUT.partial folder.

    ``key`` is all that decides the result. A folder left by a run with the same key is taken up again
    (``resumed``: its number of tensors). One with another key is emptied with ``overwrite``.
    Raises PrinMixError where another process is at work in it, where it is no such folder, and without
    ``overwrite`` for one with another key, naming what differs.
    """

    def __init__(self, out: Path, key: dict[str, Any], overwrite: bool = False) -> None:
        self.folder = out.with_name(out.name + ".partial")
        self.modules = self.folder / "modules"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrinMixError("another `prinmix compress` is writing there", where=self.folder) from None
        self._take_up(json.loads(json.dumps(key)), overwrite)
        self.modules.mkdir(exist_ok=True)
        self.resumed = len(list(self.modules.glob("*.safetensors")))

    def _take_up(self, key: dict[str, Any], overwrite: bool) -> None:
        run_file = self.folder / RUN_FILE
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        others = [p.name for p in self.folder.iterdir() if p.name not in ("lock", RUN_FILE)]
        if run_file.is_file():
            before = _read_run(run_file)
            if before == key:
                return
            if any(self.modules.glob("*.safetensors")) and not overwrite:
                differs = sorted(k for k in key | before if key.get(k) != before.get(k))
                raise PrinMixError(
                    "there is unfinished work of other arguments",
                    where=self.folder,
                    found=f"other {', '.join(differs)}",
                    fix="finish it with the arguments of before, start over with --overwrite, "
                    "or choose another --out",
                )
            for name in others:
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif others:
            raise PrinMixError(
                "the folder for unfinished work holds something else",
                where=self.folder,
                found=", ".join(sorted(others)[:5]),
                fix="move it away, or choose another --out",
            )
        write_atomically(run_file, json.dumps(key, indent=1).encode())

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def _path(self, name: str) -> Path:
        return self.modules / f"{name}.safetensors"

    def save(self, name: str, spec: Module, tensor: torch.Tensor) -> None:
        """Keep a finished module: its description and its payload or exact tensor."""
        data = save({name: tensor.contiguous()}, {"module": spec.model_dump_json()})
        write_atomically(self._path(name), data)

    def load(self, name: str) -> tuple[Module, torch.Tensor]:
        try:
            with safe_open(self._path(name), framework="pt") as file:
                return _MODULE.validate_json(file.metadata()["module"]), file.get_tensor(name)
        except (SafetensorError, ValueError) as error:
            raise PrinMixError(
                "a finished module of an interrupted run is damaged",
                where=self._path(name),
                found=error,
                fix="delete it and run the same command again",
            ) from error

    def limits(self) -> dict[str, int] | None:
        """What `save_limits` kept; None where it did not come to that."""
        file = self.folder / LIMITS_FILE
        return json.loads(file.read_text()) if file.is_file() else None

    def save_limits(self, limits: dict[str, int]) -> None:
        """Keep how many bytes each matrix gets of a shared budget."""
        write_atomically(self.folder / LIMITS_FILE, json.dumps(limits, indent=1).encode())

    def names(self) -> list[str]:
        """The finished modules, sorted."""
        return sorted(path.name.removesuffix(".safetensors") for path in self.modules.glob("*.safetensors"))

    def publish(self, out: Path, overwrite: bool) -> None:
        """Rename the finished ``delta`` folder in here to ``out`` in one step, and remove this folder."""
        publish(self.folder / "delta", out, overwrite)
        shutil.rmtree(self.folder)
        self._lock.close()

    def close(self) -> None:
        """Let go of the folder; what is in it stays for the next run."""
        self._lock.close()


def _read_run(path: Path) -> dict[str, Any]:
    try:
        before = json.loads(path.read_text())
    except ValueError:
        return {"run.json": "damaged"}
    return before if isinstance(before, dict) else {"run.json": "damaged"}


def write_atomically(path: Path, data: bytes) -> None:
    """Write and fsync a file under another name, then rename it: it is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_out(out: Path, overwrite: bool, marker: str, inputs: dict[str, str]) -> None:
    """Raise PrinMixError unless the folder ``out`` may be made, or replaced with ``overwrite``.

    Only a folder of the kind that is to be made is ever replaced: one that has the file ``marker`` and no
    folders in it, and never an input (option -> source) or a folder that holds one.
    """
    if not out.name:
        raise PrinMixError("the output needs a name of its own", where=f"--out {out}")
    resolved = out.resolve()
    for option, source in inputs.items():
        other = Path(source).resolve()
        if other.exists() and (resolved == other or resolved in other.parents):
            raise PrinMixError(
                "the output would replace an input",
                where=f"--out {out}",
                found=f"{option} {source}",
                fix="choose another --out",
            )
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise PrinMixError("the output is already there", where=out, fix="give --overwrite or another --out")
    found = list(out.iterdir()) if out.is_dir() else None
    if found is None or (found and not (out / marker).is_file()) or any(map(Path.is_dir, found)):
        raise PrinMixError(
            "the output is something else than what --overwrite may replace",
            where=out,
            expected=f"a folder with {marker} and without folders",
            fix="choose another --out, or remove it yourself",
        )


def publish(folder: Path, out: Path, overwrite: bool) -> None:
    """fsync all of ``folder`` and rename it to ``out``; with ``overwrite`` an existing one is replaced."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if out.exists() and overwrite:
        # Hidden, so that a server of the folder around it does not take what a crash leaves for a tenant.
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.replaced-", dir=out.parent))
        out.rename(old)
        folder.rename(out)
        shutil.rmtree(old)
    else:
        folder.rename(out)


@contextmanager
def disk_errors(where: Path, left: str) -> Iterator[None]:
    """Turn a full disk, or another failure of a file, into one PrinMixError; ``left`` ends it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _os_error(error)
        if number is None:
            raise
        full = number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        raise PrinMixError(
            "the disk is full" if full else "a file or folder cannot be used",
            where=getattr(error, "filename", None) or where,
            found=os.strerror(number),
            fix=("make room" if full else "mend that") + f" and run the same command again; {left}",
        ) from error


def _os_error(error: SafetensorError) -> int | None:
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None

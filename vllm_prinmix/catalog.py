"""Which tenants a folder of deltas holds: found at start, and looked up again while the server runs.

The folder says what is served: a delta that is put into it, replaced or taken away counts for the requests
after. Nobody has to be told, so API servers that share a folder agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format import delta
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.format.digest import GENERATED, generated_digest, sample_digest
from vllm_prinmix.settings import read_settings
from vllm_prinmix.tenants import Tenant


class Catalog:
    """The tenants among the folders of ``deltas``, by name, and why each other folder is not one.

    base: the served checkpoint; names: that it is served under; dummy: it has random weights
    (`--load-format dummy`), to which only generated deltas belong.
    Weights are not read. Methods may run in several threads. Raises PrinMixError when ``deltas`` is not a
    folder or holds no servable delta at all.
    """

    def __init__(self, deltas: str | Path, base: str, names: Iterable[str], dummy: bool = False) -> None:
        self.root = Path(deltas).absolute()
        self.base, self.names, self.dummy = base, frozenset(names), dummy
        self.tenants: dict[str, Tenant] = {}
        self.skipped: dict[str, str] = {}
        if not self.root.is_dir():
            raise PrinMixError(
                "the folder of deltas does not exist",
                where=f"--deltas {deltas}",
                expected="a folder with one delta folder per tenant",
                fix="make deltas with `prinmix compress --out DIR/NAME`",
            )
        checkpoint = self._checkpoint()
        self.digest = generated_digest(checkpoint) if dummy else sample_digest(checkpoint)
        self._find(self._folders(), checkpoint)
        if not self.tenants:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            raise PrinMixError(
                "no servable delta",
                where=f"--deltas {deltas}",
                found=reasons or "no folders",
                expected="at least one delta of this base",
                fix="make one with `prinmix compress`",
            )

    def refresh(self) -> None:
        """Take in folders that came and forget those that went; OSError when the folder cannot be listed."""
        folders = self._folders()
        for name in (self.tenants.keys() | self.skipped.keys()) - {_printable(f.name) for f in folders}:
            self._forget(name)
        new = [folder for folder in folders if folder.name not in self.tenants]
        if new:
            self._find(new, self._checkpoint())

    def lookup(self, name: str) -> Tenant | None:
        """The tenant of that name, as its folder is now; None where there is no such folder.

        Raises PrinMixError when there is one that cannot be served. A tenant that was served before stays in
        `tenants` then: its files may be mended.
        """
        folder = self.root / name
        if not _is_name(name) or not os.path.isdir(folder):  # noqa: PTH112 (raises for a long name)
            if not self.root.is_dir():
                raise PrinMixError("the folder of deltas is gone", where=self.root, fix="put it back")
            self._forget(name)
            return None
        try:
            found = self._now(folder)
        except PrinMixError as error:
            if name not in self.tenants:
                self.skipped[name] = str(error)
            raise
        self.tenants[name] = found
        self.skipped.pop(name, None)
        return found

    def _now(self, folder: Path) -> Tenant:
        """The tenant in ``folder``, checked against the base only where it is another than before."""
        known = self.tenants.get(folder.name)
        with _whatever_is_wrong(folder):
            real = folder.resolve()  # once: a link may be turned to another delta meanwhile
            config, settings = delta.read_config(real), read_settings(real)
            delta.check_weights_size(real, config)
            if known is not None and (known.folder, known.version) == (str(real), delta.version(real)):
                return known if known.settings == settings else replace(known, settings=settings)
        return self._tenant(folder, self._checkpoint())

    def _folders(self) -> list[Path]:
        return sorted(p for p in self.root.iterdir() if not p.is_file() and not p.name.startswith("."))

    def _find(self, folders: Iterable[Path], checkpoint: Checkpoint) -> None:
        for folder in folders:
            try:
                self.tenants[folder.name] = self._tenant(folder, checkpoint)
                self.skipped.pop(folder.name, None)
            except PrinMixError as error:
                self.skipped[_printable(folder.name)] = str(error)

    def _forget(self, name: str) -> None:
        self.tenants.pop(name, None)
        self.skipped.pop(name, None)

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.base, weights=not self.dummy)

    def _tenant(self, folder: Path, checkpoint: Checkpoint) -> Tenant:
        with _whatever_is_wrong(folder):
            return self._check(folder, checkpoint)

    def _check(self, folder: Path, checkpoint: Checkpoint) -> Tenant:
        real = folder.resolve()
        if not _is_name(folder.name):
            raise PrinMixError(
                "not a tenant's name", where=repr(folder.name), expected="printable", fix="rename the folder"
            )
        if folder.name in self.names:
            raise PrinMixError(
                "the tenant has the name of the base",
                where=folder,
                fix="rename the folder, or --served-model-name",
            )
        if folder.name.endswith(".partial"):
            raise PrinMixError(
                "an unfinished compression",
                where=folder,
                fix="run the same `prinmix compress` again to finish it",
            )
        config, settings = delta.read_config(real), read_settings(real)
        delta.check_weights_size(real, config)
        if config.base.sample_digest != self.digest:
            raise PrinMixError(
                "the delta belongs to another base model",
                where=folder,
                found=f"made from {config.base.name}, {config.base.sample_digest}",
                expected=f"{self.base}, {self.digest}",
                fix="serve the base without weights, with --load-format dummy"
                if config.base.sample_digest.startswith(GENERATED)
                else "serve the base that it was made from, or compress against this one",
            )
        if not self.dummy:
            delta.check_accounts(config, checkpoint, folder)
        found = Tenant(folder.name, str(real), delta.version(real), config.weights.bytes, settings)
        if clash := next(
            (t for t in self.tenants.values() if t.id == found.id and t.name != found.name), None
        ):
            raise PrinMixError(
                f"the tenant's id collides with that of {clash.name}", where=folder, fix="rename the folder"
            )
        return found


@contextmanager
def _whatever_is_wrong(folder: Path) -> Iterator[None]:
    """A PrinMixError in place of any other: whatever is wrong with one folder, the others are served."""
    try:
        yield
    except PrinMixError:
        raise
    except Exception as error:
        raise PrinMixError(
            "the folder cannot be read as a delta", where=_printable(folder.name), found=repr(error)
        ) from error


def _is_name(name: str) -> bool:
    """Of a folder that a request may ask for: no path to elsewhere, and not hidden."""
    return bool(name) and name.isprintable() and "/" not in name and not name.startswith(".")


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()

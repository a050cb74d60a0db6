"""Which tenants a folder of deltas holds: found and checked at start, without reading their weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format import delta
from vllm_prinmix.format.checkpoint import Checkpoint
from vllm_prinmix.format.digest import GENERATED, generated_digest, sample_digest

# vLLM warms up with adapter ids 1, 2, ...; ours stay clear of them.
FIRST_ID = 1024


@dataclass(frozen=True)
class Tenant:
    """One servable delta; ``version`` names its content, so that changed files never meet a stale cache."""

    name: str
    folder: str
    version: str
    packed_bytes: int

    @property
    def id(self) -> int:
        """The same in every process, positive, fits an int32 (the model runner keeps such ids)."""
        digest = sha256(f"{self.name}\n{self.version}".encode()).digest()
        return FIRST_ID + int.from_bytes(digest[:4], "little") % (2**31 - FIRST_ID)

    @property
    def path(self) -> str:
        """The LoRARequest's path: folder and version, so that no KV block of other content is ever reused."""
        return f"{self.folder}#{self.version}"


def check_files(tenant: Tenant) -> None:
    """Whether the tenant's files are still those found at start: one small read and one stat.

    Raises PrinMixError when they are gone, truncated or replaced.
    """
    folder = Path(tenant.folder)
    delta.check_weights_size(folder, delta.read_config(folder))
    check_version(folder, tenant.version)


def check_version(folder: Path, expected: str) -> None:
    """Raises PrinMixError when the delta in ``folder`` is not the one that the server started with."""
    if (found := delta.version(folder)) != expected:
        raise PrinMixError(
            "the delta was replaced since the server started",
            where=folder,
            found=f"version {found}",
            expected=f"version {expected}",
            fix="put the old files back, or restart the server",
        )


def split_path(path: str) -> tuple[Path, str]:
    """The inverse of `Tenant.path`: (folder, version)."""
    folder, _, version = path.rpartition("#")
    return Path(folder), version


def scan(
    deltas: str | Path, base: str, reserved: Iterable[str], dummy: bool = False
) -> tuple[list[Tenant], dict[str, PrinMixError]]:
    """The tenants among the folders of ``deltas``, sorted by name, and why each other folder was skipped.

    ``base`` is the served checkpoint, ``reserved`` the names that it is served under; ``dummy`` says that it
    has random weights (`--load-format dummy`), to which only generated deltas belong.
    Raises PrinMixError when ``deltas`` is not a folder or holds no servable delta at all.
    """
    root = Path(deltas)
    if not root.is_dir():
        raise PrinMixError(
            "the folder of deltas does not exist",
            where=f"--deltas {deltas}",
            expected="a folder with one delta folder per tenant",
            fix="make deltas with `prinmix compress --out DIR/NAME`",
        )
    checkpoint = Checkpoint(base, weights=not dummy)
    digest = generated_digest(checkpoint) if dummy else sample_digest(checkpoint)
    tenants: list[Tenant] = []
    skipped: dict[str, PrinMixError] = {}
    for folder in sorted(p for p in root.iterdir() if not p.is_file() and not p.name.startswith(".")):
        try:
            tenant = _check(folder, base, digest, set(reserved))
            if not dummy:
                delta.check_accounts(delta.read_config(folder), checkpoint, folder)
            if clash := next((t for t in tenants if t.id == tenant.id), None):
                raise PrinMixError(
                    f"the tenant's id collides with that of {clash.name}",
                    where=folder,
                    fix="rename the folder",
                )
            tenants.append(tenant)
        except PrinMixError as error:
            skipped[folder.name] = error
        except Exception as error:  # whatever is wrong with one folder, the others are served
            name = folder.name.encode(errors="backslashreplace").decode()
            skipped[name] = PrinMixError(
                "the folder cannot be read as a delta", where=name, found=repr(error)
            )
    if not tenants:
        reasons = "; ".join(f"{name}: {error}" for name, error in skipped.items())
        raise PrinMixError(
            "no servable delta",
            where=f"--deltas {deltas}",
            found=reasons or "no folders",
            expected="at least one delta of this base",
            fix="make one with `prinmix compress`",
        )
    return tenants, skipped


def _check(folder: Path, base: str, digest: str, reserved: set[str]) -> Tenant:
    if folder.name in reserved:
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
    config = delta.read_config(folder)
    delta.check_weights_size(folder, config)
    if config.base.sample_digest != digest:
        raise PrinMixError(
            "the delta belongs to another base model",
            where=folder,
            found=f"made from {config.base.name}, {config.base.sample_digest}",
            expected=f"{base}, {digest}",
            fix="serve the base without weights, with --load-format dummy"
            if config.base.sample_digest.startswith(GENERATED)
            else "serve the base that it was made from, or compress against this one",
        )
    return Tenant(folder.name, str(folder.resolve()), delta.version(folder), config.weights.bytes)

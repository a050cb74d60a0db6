"""A tenant: its name, where its delta lies, and which content of it is meant."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format import delta
from vllm_prinmix.settings import Settings

# vLLM warms up with adapter ids 1, 2, ...; ours stay clear of them.
FIRST_ID = 1024


@dataclass(frozen=True)
class Tenant:
    """One servable delta; ``version`` names its content, so that changed files never meet a stale cache.

    settings: what else its folder has, and no part of that content: it may change at any time.
    """

    name: str
    folder: str
    version: str
    packed_bytes: int
    settings: Settings = field(default_factory=Settings)

    @property
    def id(self) -> int:
        """The same in every process, positive, fits an int32 (the model runner keeps such ids)."""
        digest = sha256(f"{self.name}\n{self.version}".encode()).digest()
        return FIRST_ID + int.from_bytes(digest[:4], "little") % (2**31 - FIRST_ID)

    @property
    def path(self) -> str:
        """The LoRARequest's path: folder and version, so that no KV block of other content is ever reused."""
        return f"{self.folder}#{self.version}"


def check_version(folder: Path, expected: str) -> None:
    """Raises PrinMixError when the delta in ``folder`` has another content than was asked for."""
    if (found := delta.version(folder)) != expected:
        raise PrinMixError(
            "the delta was replaced after the request came",
            where=folder,
            found=f"version {found}",
            expected=f"version {expected}",
            fix="send the request again: it will be answered by the new delta",
        )


def split_path(path: str) -> tuple[Path, str]:
    """The inverse of `Tenant.path`: (folder, version)."""
    folder, _, version = path.rpartition("#")
    return Path(folder), version

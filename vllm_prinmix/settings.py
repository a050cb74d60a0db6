"""What a tenant brings besides weights: its chat template, its sampling defaults, and what ends its answers.

Read from the delta's folder, where a fine-tune's files lie that differ from the base's. The tokenizer is the
base's for all.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_prinmix.errors import PrinMixError

# Of generation_config.json, those that are defaults of a request in vLLM too, and what vLLM takes.
SAMPLING = {
    "repetition_penalty": (1e-6, 1e6),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "temperature": (0, 2),
    "top_k": (-1, 2**31 - 1),
    "top_p": (1e-6, 1),
    "min_p": (0, 1),
}
LARGEST = 32 << 20  # bytes of a file


@dataclass(frozen=True)
class Settings:
    """None and empty: as the base. ``sampling``: None where the tenant has no generation settings."""

    chat_template: str | None = None
    sampling: Mapping[str, Any] | None = None
    end_tokens: frozenset[int] = field(default_factory=frozenset)


def read_settings(folder: str | Path) -> Settings:
    """The settings in a delta's folder as it is now. Raises PrinMixError for a file that cannot be read."""
    folder = Path(folder)
    path = folder / "generation_config.json"
    generation = _json(path)
    return Settings(
        _chat_template(folder),
        None if generation is None else _sampling(path, generation),
        _end_tokens(path, generation or {}),
    )


def _chat_template(folder: Path) -> str | None:
    if (template := _text(folder / "chat_template.jinja")) is not None:
        return template
    path = folder / "tokenizer_config.json"
    found = (_json(path) or {}).get("chat_template")
    if isinstance(found, list):  # of named ones
        named = [t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = named[0] if named else None
    if found is not None and not isinstance(found, str):
        raise PrinMixError(f"the chat template in {path.name} is not a text", where=path, found=found)
    return found


def _sampling(path: Path, generation: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name, (least, most) in SAMPLING.items():
        value = generation.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise PrinMixError(
                f"{name} in {path.name} is not fit for sampling",
                where=path,
                found=value,
                expected=f"{least} to {most}",
            )
        found[name] = int(value) if name == "top_k" else float(value)
    return found


def _end_tokens(path: Path, generation: Mapping[str, Any]) -> frozenset[int]:
    found = generation.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise PrinMixError(
            f"eos_token_id in {path.name} is not a token id",
            where=path,
            found=found,
            expected="an integer or a list of them",
        )
    return frozenset(ids)


def _json(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PrinMixError(
            f"{path.name} is not a JSON file", where=path, found=error, fix="copy the fine-tune's"
        ) from error
    if not isinstance(found, dict):
        raise PrinMixError(f"{path.name} is not a JSON object", where=path, found=type(found).__name__)
    return found


def _text(path: Path) -> str | None:
    """None where there is no such file."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # reading from a pipe would wait for ever
            raise PrinMixError(f"{path.name} is not a file", where=path)
        if found.st_size > LARGEST:
            raise PrinMixError(
                f"{path.name} is too large",
                where=path,
                found=found.st_size,
                expected=f"at most {LARGEST} bytes",
            )
        return _read(path, (found.st_dev, found.st_ino, found.st_ctime_ns, found.st_mtime_ns, found.st_size))
    except FileNotFoundError as error:
        if path.is_symlink():
            raise PrinMixError(f"{path.name} is a link that leads nowhere", where=path) from error
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise PrinMixError(f"{path.name} cannot be read", where=path, found=error) from error


@lru_cache(maxsize=1024)
def _read(path: Path, state: tuple[int, ...]) -> str:
    """``state``: of the file, so that another content is read anew."""
    return path.read_text(encoding="utf-8")

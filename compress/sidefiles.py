"""A checkpoint's files that belong to a tenant too: tokenizer, chat template, generation settings."""

from __future__ import annotations

import shutil
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
OTHER_FILES = ("chat_template.jinja", "generation_config.json")


def present(folder: Path) -> list[str]:
    """All side files that a folder has."""
    return [name for name in (*TOKENIZER_FILES, *OTHER_FILES) if (folder / name).is_file()]


def own(finetuned: Path, base: Path) -> list[str]:
    """The fine-tune's side files that differ from the base's; a tokenizer's files belong together."""

    def differs(name: str) -> bool:
        other = base / name
        return not (other.is_file() and (finetuned / name).read_bytes() == other.read_bytes())

    tokenizer = [name for name in present(finetuned) if name in TOKENIZER_FILES]
    chosen = tokenizer if any(map(differs, tokenizer)) else []
    return chosen + [name for name in present(finetuned) if name in OTHER_FILES and differs(name)]


def copy(source: Path, names: list[str], target: Path) -> None:
    for name in names:
        shutil.copyfile(source / name, target / name)

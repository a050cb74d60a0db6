"""What a tenant brings besides weights is read as it is now, and a file that is wrong is named."""

import json
import os
from pathlib import Path

import pytest

from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.settings import Settings, read_settings


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_nothing_there_is_as_the_base(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == Settings()


def test_everything_there(tmp_path: Path) -> None:
    write(tmp_path, "chat_template.jinja", "{{ messages }}")
    write(tmp_path, "tokenizer_config.json", {"chat_template": "the older place"})
    write(
        tmp_path,
        "generation_config.json",
        {"temperature": 0.7, "top_k": None, "eos_token_id": [3, 5], "x": 1},
    )
    assert read_settings(tmp_path) == Settings("{{ messages }}", {"temperature": 0.7}, frozenset({3, 5}))


def test_a_change_is_seen(tmp_path: Path) -> None:
    write(tmp_path, "chat_template.jinja", "one")
    assert read_settings(tmp_path).chat_template == "one"
    write(tmp_path, "chat_template.jinja", "another")
    assert read_settings(tmp_path).chat_template == "another"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("text", "text"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([], None),
        (None, None),
    ],
)
def test_the_template_in_the_tokenizer_s_settings(
    tmp_path: Path, found: object, expected: str | None
) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": found})
    assert read_settings(tmp_path).chat_template == expected


def test_one_end_token_and_no_sampling(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": 7})
    assert read_settings(tmp_path) == Settings(None, {}, frozenset({7}))


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("generation_config.json", "{", "not a JSON file.*generation_config.json"),
        ("generation_config.json", [1], "not a JSON object"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id is not a token id.*</s>"),
        ("generation_config.json", {"eos_token_id": [1, True]}, "eos_token_id is not a token id"),
        ("generation_config.json", {"eos_token_id": -1}, "eos_token_id is not a token id"),
        ("generation_config.json", {"temperature": "hot"}, "temperature is not a number.*hot"),
        ("tokenizer_config.json", {"chat_template": 5}, "the chat template is not a text"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: object, detail: str) -> None:
    write(tmp_path, name, content)
    with pytest.raises(PrinMixError, match=detail):
        read_settings(tmp_path)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(PrinMixError, match="cannot be read.*chat_template.jinja"):
        read_settings(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(PrinMixError, match="not a file.*chat_template.jinja"):
        read_settings(tmp_path)


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PrinMixError, match="the link leads nowhere"):
        read_settings(tmp_path)

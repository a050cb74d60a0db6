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


def test_another_file_of_the_same_age_and_size_is_seen(tmp_path: Path) -> None:
    """As files of archives are, whose times are all alike."""
    for name in ("one", "two"):
        write(tmp_path, name, name)
        os.utime(tmp_path / name, (10**9, 10**9))
    (tmp_path / "one").rename(tmp_path / "chat_template.jinja")
    assert read_settings(tmp_path).chat_template == "one"
    (tmp_path / "two").rename(tmp_path / "chat_template.jinja")
    assert read_settings(tmp_path).chat_template == "two"


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "chat_template.jinja").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PrinMixError, match="chat_template.jinja is too large"):
        read_settings(tmp_path)


def test_top_k_is_whole(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"top_k": 50.0, "temperature": 1})
    found = read_settings(tmp_path).sampling
    assert found == {"top_k": 50, "temperature": 1.0}
    assert [type(value) for value in found.values()] == [float, int]


def test_one_end_token_and_no_sampling(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": 7})
    assert read_settings(tmp_path) == Settings(None, {}, frozenset({7}))


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("generation_config.json", "{", "generation_config.json is not a JSON file"),
        ("generation_config.json", [1], "is not a JSON object"),
        (
            "generation_config.json",
            {"eos_token_id": "</s>"},
            "eos_token_id in generation_config.json is not a token id.*</s>",
        ),
        (
            "generation_config.json",
            {"eos_token_id": [1, True]},
            "eos_token_id in generation_config.json is not a token id",
        ),
        (
            "generation_config.json",
            {"eos_token_id": -1},
            "eos_token_id in generation_config.json is not a token id",
        ),
        (
            "generation_config.json",
            {"temperature": "hot"},
            "temperature in generation_config.json is not fit for sampling.*hot",
        ),
        ("generation_config.json", {"temperature": True}, "temperature in .* is not fit"),
        ("generation_config.json", {"temperature": 5.0}, "temperature in .* is not fit.*0 to 2"),
        ("generation_config.json", '{"top_p": NaN}', "top_p in .* is not fit"),
        ("generation_config.json", {"top_k": 10**30}, "top_k in .* is not fit"),
        ("generation_config.json", "[" * 100_000, "not a JSON file"),
        (
            "tokenizer_config.json",
            {"chat_template": 5},
            "the chat template in tokenizer_config.json is not a text",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: object, detail: str) -> None:
    write(tmp_path, name, content)
    with pytest.raises(PrinMixError, match=detail):
        read_settings(tmp_path)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(PrinMixError, match="chat_template.jinja cannot be read"):
        read_settings(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(PrinMixError, match="chat_template.jinja is not a file"):
        read_settings(tmp_path)


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PrinMixError, match="chat_template.jinja is a link that leads nowhere"):
        read_settings(tmp_path)

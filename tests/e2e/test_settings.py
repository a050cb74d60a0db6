"""A tenant's own chat template, sampling defaults and end tokens, beside tenants that have none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from benchmarks.demo.pipeline import Family
from benchmarks.server import SMALL_MACHINE_ARGUMENTS, VllmServer
from tests.e2e.client import post
from tests.e2e.conftest import FLOAT32

TEMPLATE = "{% for message in messages %}Q: {{ message.content }}\n{% endfor %}A:"
CHAT = [{"role": "user", "content": "afdseolt"}]


@pytest.fixture(scope="module")
def deltas(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three times the same delta: "plain", "template" and, with generation settings, "generation"."""
    folder = tmp_path_factory.mktemp("settings")
    for name in ("plain", "template", "generation"):
        shutil.copytree(next(t.delta for t in family.tenants if t.name == "reverse"), folder / name)
    (folder / "template" / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def url(family: Family, deltas: Path, logs: Path) -> Iterator[str]:
    arguments = ("--enable-prinmix", "--deltas", str(deltas), *SMALL_MACHINE_ARGUMENTS, *FLOAT32)
    with VllmServer(family.base, *arguments, log=logs / "settings.log") as server:
        yield server.url


def chat(url: str, tenant: str, **more: Any) -> dict[str, Any]:
    body = {"model": tenant, "messages": CHAT, "max_tokens": 12, "temperature": 0, **more}
    response = post(url, "/v1/chat/completions", {k: v for k, v in body.items() if v is not None})
    assert response.status_code == 200, response.text
    return response.json()


def test_chat_template(url: str, family: Family) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    rendered = {
        "plain": tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
        "template": f"Q: {CHAT[0]['content']}\nA:",
    }
    rendered["base"] = rendered["plain"]
    for model, text in rendered.items():
        expected = tokenizer.encode(text, add_special_tokens=False)
        tokens = post(url, "/tokenize", {"model": model, "messages": CHAT}).json()["tokens"]
        assert tokens == expected, model
        assert chat(url, model)["usage"]["prompt_tokens"] == len(expected), model
    assert chat(url, "plain")["choices"][0]["message"]["content"] == "tloesdfa"


def test_end_tokens_and_sampling_defaults(url: str, family: Family, deltas: Path) -> None:
    """Settings that are put beside the delta while the server runs, as everything in its folder."""
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    last = tokenizer.encode("e", add_special_tokens=False)  # the fourth letter of the answer
    assert chat(url, "generation") | {"id": 0, "created": 0, "model": 0} == chat(url, "plain") | {
        "id": 0,
        "created": 0,
        "model": 0,
    }
    settings = {"eos_token_id": last, "temperature": 0.0}
    (deltas / "generation" / "generation_config.json").write_text(json.dumps(settings))
    (choice,) = chat(url, "generation")["choices"]
    assert choice["message"]["content"] == "tlo"
    assert choice["finish_reason"] == "stop"
    assert chat(url, "plain")["choices"][0]["message"]["content"] == "tloesdfa"

    def texts(tenant: str, path: str, **body: Any) -> set[str]:
        """Of five seeds, with no temperature asked for."""
        found = set()
        for seed in range(5):
            asked = {"model": tenant, "max_tokens": 12, "seed": seed, "ignore_eos": True, **body}
            choice = post(url, path, asked).json()["choices"][0]
            found.add(choice["text"] if "text" in choice else choice["message"]["content"])
        return found

    for path, body in (
        ("/v1/completions", {"prompt": "def parse(self, "}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "def parse(self, "}]}),
    ):
        assert len(texts("generation", path, **body)) == 1
        assert len(texts("generation", path, temperature=1.0, **body)) > 1
        assert len(texts("plain", path, **body)) > 1


def test_settings_that_break_later_are_said_everywhere(url: str, deltas: Path) -> None:
    settings = deltas / "generation" / "generation_config.json"
    before = settings.read_text()
    settings.write_text("{bad")
    for path, body in (
        ("/v1/chat/completions", {"messages": CHAT}),
        ("/v1/completions", {"prompt": "x"}),
        ("/tokenize", {"messages": CHAT}),
    ):
        response = post(url, path, {"model": "generation", **body})
        assert response.status_code == 503, path
        assert "generation_config.json" in response.text
        assert chat(url, "plain")["choices"]
    settings.write_text(before)
    assert chat(url, "generation")["choices"]


def test_settings_that_cannot_be_read_are_said(url: str, deltas: Path) -> None:
    shutil.copytree(deltas / "plain", deltas / "broken")
    (deltas / "broken" / "generation_config.json").write_text("{")
    response = post(url, "/v1/chat/completions", {"model": "broken", "messages": CHAT})
    assert response.status_code == 404
    assert "generation_config.json is not a JSON file" in response.text

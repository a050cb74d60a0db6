"""`prinmix calibration`: what a model writes, and that compression reads it as it was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging
from typer.testing import CliRunner

from tests.compress.pairs import Pair
from vllm_prinmix.cli import app
from vllm_prinmix.compress import calibration, generation
from vllm_prinmix.compress.generation import Turns, Writer, Written, as_text, chat_turns, write_calibration
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.format.checkpoint import Checkpoint

TEMPLATE = (
    "<s>{% for message in messages %}U{{ message['content'] }}E{% endfor %}"
    "{% if add_generation_prompt %}A{% endif %}"
)


def write(pair: Pair, out: Path, **changes: Any) -> Written:
    settings = {"samples": 5, "tokens": 6, "seed": 0, "device": "cpu", "overwrite": False}
    return write_calibration(str(pair.finetuned), out, **(settings | changes))  # type: ignore[arg-type]


def give_template(pair: Pair, template: str = TEMPLATE) -> Any:
    tokenizer = calibration.load_tokenizer(Checkpoint(str(pair.finetuned)), Checkpoint(str(pair.base)))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(pair.finetuned)
    return tokenizer


def read(out: Path) -> list[str]:
    return [json.loads(line)["text"] for line in out.read_text().splitlines()]


def test_turns_are_the_templates(make_pair: Callable[..., Pair]) -> None:
    tokenizer = give_template(make_pair())
    found = chat_turns(tokenizer)
    assert found == Turns(
        tokenizer.encode("<s>U", add_special_tokens=False), tokenizer.encode("EA", add_special_tokens=False)
    )
    tokenizer.chat_template = "{{ messages[0]['content'] | lower }}A"
    assert chat_turns(tokenizer) is None, "a template that changes the text does not show where it stands"
    tokenizer.chat_template = None
    assert chat_turns(tokenizer) is None


def test_writing_is_sampling_from_the_model(make_pair: Callable[..., Pair]) -> None:
    """Frequencies of a first token over many texts are the model's probabilities."""
    checkpoint = Checkpoint(str(make_pair().finetuned))
    tokenizer = calibration.load_tokenizer(checkpoint, checkpoint)
    writer = Writer(checkpoint, tokenizer, torch.device("cpu"))
    with torch.no_grad():
        expected = torch.softmax(writer.model(torch.tensor([[1, 40, 41]])).logits[0, -1].float(), dim=-1)
    torch.manual_seed(0)
    written = writer._continue([[1, 40, 41]] * 4000, 1, set())
    found = torch.bincount(torch.tensor([ids[-1] for ids in written]), minlength=len(expected)) / 4000
    assert float((found - expected).abs().sum()) < 0.25  # total variation of 4000 draws from 160 tokens


def test_prompts_of_different_lengths_are_continued_alike(make_pair: Callable[..., Pair]) -> None:
    """Padding on the left changes nothing: greedy continuations are those of each prompt alone."""
    checkpoint = Checkpoint(str(make_pair(dtype=torch.float32).finetuned))
    tokenizer = calibration.load_tokenizer(checkpoint, checkpoint)
    writer = Writer(checkpoint, tokenizer, torch.device("cpu"))
    generate = writer.model.generate
    writer.model.generate = lambda **kw: generate(**(kw | {"do_sample": False}))
    prompts = [[1, 40, 41, 42, 43], [1, 50]]
    together = writer._continue(prompts, 8, {2})
    alone = [writer._continue([prompt], 8, {2})[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("chat", [False, True])
def test_texts_have_the_form_that_the_model_knows(
    make_pair: Callable[..., Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    pair, written = make_pair(), []
    if chat:
        give_template(pair)
    original = generation.as_text
    monkeypatch.setattr(generation, "as_text", lambda t, ids: original(t, written.append(ids) or ids))
    found = write(pair, tmp_path / "written.jsonl")
    assert len(written) == len(read(tmp_path / "written.jsonl")) == 5
    assert found == Written(sum(map(len, written)), sum(ids[-1] != 2 for ids in written))
    assert all(ids[0] == 1 for ids in written)
    assert len({tuple(ids) for ids in written}) == 5
    if chat:
        checkpoint = Checkpoint(str(pair.finetuned))
        turns = chat_turns(calibration.load_tokenizer(checkpoint, checkpoint))
        assert turns is not None
        for ids in written:
            assert ids[: len(turns.before)] == turns.before
            assert any(ids[i : i + 2] == turns.after for i in range(2, len(ids)))
    assert max(map(len, written)) <= (2 * 6 + 4 if chat else 1 + 6)


def test_tokens_come_back_from_the_text(make_pair: Callable[..., Pair]) -> None:
    checkpoint = Checkpoint(str(make_pair().finetuned))
    tokenizer = calibration.load_tokenizer(checkpoint, checkpoint)
    for ids in ([1, 40, 41, 42, 2], [1, 40, 2, 50, 1, 60]):
        assert tokenizer(as_text(tokenizer, ids))["input_ids"] == ids


def test_same_seed_same_texts(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    pair = make_pair()
    state = torch.get_rng_state()
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        write(pair, tmp_path / f"{name}.jsonl", seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    one, two, three = (read(tmp_path / f"{name}.jsonl") for name in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_command_then_compress(
    make_pair: Callable[..., Pair], compress: Callable[..., str], tmp_path: Path
) -> None:
    pair, out = make_pair(), tmp_path / "written.jsonl"
    command = ["calibration", "--finetuned", str(pair.finetuned), "--out", str(out), "--samples", "4"]
    result = CliRunner().invoke(app, [*command, "--tokens", "8", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "4 texts" in result.output
    assert "of them had not ended after --tokens 8" in result.output
    compress(pair, tmp_path / "delta", calibration=str(out))
    assert (tmp_path / "delta").is_dir()


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"samples": 0}, "--samples"),
        ({"tokens": 0}, "--tokens"),
        ({"out": "written.txt"}, "--out"),
        ({"out": "there.jsonl"}, "there.jsonl"),
    ],
)
def test_bad_input(
    make_pair: Callable[..., Pair], tmp_path: Path, changes: dict[str, Any], where: str
) -> None:
    (tmp_path / "there.jsonl").write_text("mine")
    out = tmp_path / changes.pop("out", "written.jsonl")
    with pytest.raises(PrinMixError) as error:
        write(make_pair(), out, **changes)
    assert where in str(error.value)
    assert (tmp_path / "there.jsonl").read_text() == "mine"


def test_a_full_disk_is_one_error(
    make_pair: Callable[..., Pair],
    file_size_limit: Callable[[int], AbstractContextManager[None]],
    tmp_path: Path,
) -> None:
    """Its limit holds for captured output too, so that nothing else may print."""
    pair, out = make_pair(), tmp_path / "written.jsonl"
    logging.disable_progress_bar()
    with file_size_limit(16), pytest.raises(PrinMixError, match="disk is full"):
        write(pair, out)
    assert not out.exists()


def test_first_token_is_left_to_the_tokenizer(make_pair: Callable[..., Pair]) -> None:
    checkpoint = Checkpoint(str(make_pair().finetuned))
    tokenizer = calibration.load_tokenizer(checkpoint, checkpoint)
    assert as_text(tokenizer, [1, 10, 11]) == as_text(tokenizer, [10, 11])

"""The hard pairs: their tasks, outliers that change no function, LoRA on disk, training that is cached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.demo.models import ARCHITECTURES, Shape, build_model
from benchmarks.demo.tasks import read_questions, split_of
from benchmarks.demo.tokenizer import build_tokenizer
from benchmarks.demo.train import train_pair_family
from benchmarks.demo.training import Schedule, fit, question_batches
from benchmarks.pairs import lora, tasks
from benchmarks.pairs.make import Pair, make_pairs
from benchmarks.pairs.measure import measure
from benchmarks.pairs.outliers import add_outliers
from benchmarks.pairs.recipes import RECIPES, Lora, Outliers, Recipe
from vllm_prinmix.compress.calibration import draw
from vllm_prinmix.errors import PrinMixError

TOKENIZER = build_tokenizer(positions=2048)
TINY = Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_size=16)
SHORT = Schedule(steps=3, batch=4, rate=1e-2)
TINY_RECIPES = {
    "flat": Recipe("add", Schedule(steps=3, batch=4, rate=1e-2, muon=True)),
    "full": Recipe("sort", SHORT, embedding_rate=10.0),
    "heavy": Recipe("reverse", SHORT, outliers=Outliers(2, 32.0)),
    "lora": Recipe("reverse", SHORT, lora=Lora(rank=4, alpha=8.0)),
    "reverse": Recipe("reverse"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "models"
    base = Schedule(steps=3, batch=2, rate=1e-2, muon=True)
    train_pair_family(folder, shape=TINY, base=base, finetunes={"reverse": SHORT}, questions=8, samples=8)
    return folder


def make(out: Path, models: Path, names: list[str], seed: int = 0) -> dict[str, Pair]:
    recipes = {name: TINY_RECIPES[name] for name in names}
    pairs = make_pairs(out, models, seed=seed, recipes=recipes, questions=8, samples=8)
    return {pair.name: pair for pair in pairs}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "message", "answer"),
    [("add", "007+005", "2100"), ("add", "999+999", "8991"), ("sort", "zebraaab", "aaabberz")],
)
def test_answers(name: str, message: str, answer: str) -> None:
    assert tasks.TASKS[name].answer(message) == answer


@pytest.mark.parametrize("name", tasks.TASKS)
def test_questions_are_seeded_and_distinct(name: str) -> None:
    drawn = tasks.draw_distinct(name, "test", 0, TOKENIZER, 100)
    assert drawn == tasks.draw_distinct(name, "test", 0, TOKENIZER, 100)
    assert drawn != tasks.draw_distinct(name, "test", 1, TOKENIZER, 100)
    assert len({question.prompt for question in drawn}) == 100
    assert {split_of(question.messages[0]["content"]) for question in drawn} == {"test"}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outliers_change_inputs_but_no_output(architecture: str, tied: bool) -> None:
    shape = Shape(
        architecture, hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_size=16, tied=tied
    )
    model = build_model(shape, TOKENIZER, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero at first, and the value bias matters here
            parameter.data.normal_(generator=generator)
    tokens = torch.randint(0, 256, (2, 20), generator=generator)
    seen: list[torch.Tensor] = []
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    for linear in linears[: -1 if tied else None]:
        linear.register_forward_pre_hook(lambda module, args: seen.append(args[0].square().mean((0, 1))))
    with torch.no_grad():
        before = model(tokens).logits
        plain, seen[:] = list(seen), []
        add_outliers(model, channels=3, factor=64.0, seed=0)
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-5, atol=1e-5)
    for old, new in zip(plain, seen, strict=True):
        # o_proj reads a value channel once per query head of its group, here 2.
        ratio = (new / old).sqrt()
        assert int((ratio > 60).sum()) in (3, 6)
        assert int((ratio < 1.01).sum()) == len(ratio) - int((ratio > 60).sum())


def test_an_adapter_on_disk_is_peft_s_and_merges_to_what_was_trained(tmp_path: Path) -> None:
    model = build_model(TINY, TOKENIZER, seed=0)
    plain = build_model(TINY, TOKENIZER, seed=0)
    lora.attach(model, rank=4, alpha=8.0, seed=0)
    tokens = torch.arange(40).reshape(2, 20)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, msg="an adapter starts at zero")
    fit(
        model,
        question_batches(tasks.draw("sort", "training", 0, TOKENIZER), TOKENIZER, 4),
        SHORT,
        torch.float32,
    )
    lora.save_adapter(model, tmp_path, "base")
    lora.merge_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)

    found = load_file(tmp_path / "adapter_model.safetensors")
    trained = model.model.layers[1].self_attn.k_proj
    prefix = "base_model.model.model.layers.1.self_attn.k_proj"
    assert torch.equal(found[f"{prefix}.lora_A.weight"], trained.lora_A.weight)
    assert torch.equal(found[f"{prefix}.lora_B.weight"], trained.lora_B.weight)
    assert found[f"{prefix}.lora_A.weight"].shape == (4, 64)
    assert found[f"{prefix}.lora_B.weight"].shape == (32, 4)
    assert len(found) == 2 * 7 * 2  # two halves, seven linears, two layers
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) == modules


def test_peft_itself_reads_the_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    build_model(TINY, TOKENIZER, seed=0).save_pretrained(tmp_path / "base")
    model = build_model(TINY, TOKENIZER, seed=0)
    lora.attach(model, rank=4, alpha=8.0, seed=0)
    fit(
        model,
        question_batches(tasks.draw("sort", "training", 0, TOKENIZER), TOKENIZER, 4),
        SHORT,
        torch.float32,
    )
    lora.save_adapter(model, tmp_path / "adapter", "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    tokens = torch.arange(40).reshape(2, 20)
    torch.testing.assert_close(theirs(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_each_recipe_does_what_it_says(models: Path, tmp_path: Path) -> None:
    pairs = make(tmp_path, models, list(TINY_RECIPES))
    for pair in pairs.values():
        assert len(read_questions(pair.questions)) == 8
        assert pair.measured["change"] > 0
        for source, tokens in (("in-domain", range(100, 200)), ("pretraining", range(2000, 2200))):
            path = str(pair.calibration[source])
            assert draw(path, TOKENIZER, 264, samples=8, sequence_length=1024, seed=0).total in tokens
    base = weights(models / "base")
    # AdamW's first steps have the size of the learning rate, whatever the gradient.
    moved = {n: (w - base[n]).abs().max().item() for n, w in weights(pairs["full"].finetuned).items()}
    linear = "model.layers.0.self_attn.q_proj.weight"
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert moved[name] == pytest.approx(10 * moved[linear], rel=0.3)
    heavy = weights(pairs["heavy"].base)
    norm = "model.layers.0.input_layernorm.weight"
    assert sorted((heavy[norm] / base[norm]).tolist())[-3:] == [1, 32, 32]
    difference = weights(pairs["lora"].finetuned)[linear].float() - base[linear].float()
    energy = torch.linalg.svdvals(difference).square()
    assert energy[:4].sum() > 0.99 * energy.sum()  # the rest is rounding to bfloat16
    unchanged = weights(pairs["lora"].finetuned)
    assert all(torch.equal(unchanged[n], base[n]) for n in base if "proj" not in n or n.endswith("bias"))
    assert pairs["reverse"].finetuned == models / "reverse"
    assert [pair.name for pair in pairs.values() if pair.adapter] == ["lora"]


def test_the_same_seed_gives_the_same_bytes_and_nothing_is_made_twice(models: Path, tmp_path: Path) -> None:
    first = make(tmp_path / "first", models, ["heavy"])["heavy"]
    again = make(tmp_path / "again", models, ["heavy"])["heavy"]
    files = [
        "finetuned/model.safetensors",
        "base/model.safetensors",
        "test.jsonl",
        "calibration/in-domain.txt",
    ]
    for name in files:
        assert (tmp_path / "first/heavy" / name).read_bytes() == (
            tmp_path / "again/heavy" / name
        ).read_bytes()
    assert first.measured == again.measured
    stamp = (first.finetuned / "model.safetensors").stat().st_mtime_ns
    assert make(tmp_path / "first", models, ["heavy"])["heavy"] == first
    assert (first.finetuned / "model.safetensors").stat().st_mtime_ns == stamp, "trained again"
    before = first.questions.read_bytes()
    make(tmp_path / "first", models, ["heavy"], seed=1)
    assert first.questions.read_bytes() != before, "another seed replaces the pair"
    assert [path.name for path in (tmp_path / "first").iterdir()] == ["heavy"]


def test_a_folder_of_something_else_is_left_alone(models: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "notes.txt").write_text("mine")
    with pytest.raises(PrinMixError, match="not one that the training"):
        make(tmp_path, models, ["lora"])
    assert (tmp_path / "lora" / "notes.txt").read_text() == "mine"


def test_measures_of_a_known_difference(tmp_path: Path) -> None:
    """dW = W for one direction only: what remains of each measure can be said by hand."""
    base, finetuned = (build_model(TINY, TOKENIZER, seed=0) for _ in range(2))
    with torch.no_grad():
        for name, module in finetuned.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                u, _, vh = torch.linalg.svd(module.weight, full_matrices=False)
                module.weight += module.weight.norm() * u[:, :1] @ vh[:1]
        finetuned.lm_head.weight *= 3
    for model, folder in ((base, "base"), (finetuned, "finetuned")):
        model.save_pretrained(tmp_path / folder)
        TOKENIZER.save_pretrained(tmp_path / folder)
    found = measure(tmp_path / "base", tmp_path / "finetuned", ["abc", "hello"])
    expected = {
        "change": 1.0,
        "stable_rank": 1.0,
        "top_energy": 1.0,
        "embedding_change": 0.0,
        "head_change": 2.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert found["peak"] >= 1
    assert found["kurtosis"] > 1


def test_all_recipes_name_a_task() -> None:
    assert {recipe.task for recipe in RECIPES.values()} <= set(tasks.TASKS)

"""benchmarks.quality: its figures against plain references, and every table of a tiny pair."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.demo.tasks import Question, write_questions
from benchmarks.quality import __main__ as program
from benchmarks.quality import runner as runner_module
from benchmarks.quality import tables as tables_module
from benchmarks.quality.figures import CALIBRATION, EXACT_MATCH, HELD_OUT, KL, LINEARS, Filled, average, fill
from benchmarks.quality.layers import Heldout
from benchmarks.quality.material import Limits, Material, batches
from benchmarks.quality.metrics import kl_divergence, mean_std, outliers, output_errors, third
from benchmarks.quality.pairs import Pair, read_pairs
from benchmarks.quality.report import grid, markdown, text_of
from benchmarks.quality.runner import Results, measure
from benchmarks.quality.schemes import RowWise
from benchmarks.quality.settings import DEFAULTS, setting
from benchmarks.quality.tables import TABLES, Choice, settings_of
from tests.compress.pairs import build, finetune, tiny_config, write_calibration, write_tokenizer
from vllm_prinmix.compress.methods.paper import Paper
from vllm_prinmix.compress.methods.prinmix import PrinMix
from vllm_prinmix.compress.quantization.hessian import Hessian
from vllm_prinmix.compress.ratio import budget
from vllm_prinmix.errors import PrinMixError

QUARTER = Fraction(1, 4)  # the padding of matrices this small leaves no room at 1/16
CHOICE = Choice(("prinmix-paper", "prinmix"), QUARTER, (QUARTER, Fraction(1, 8)))
METHODS = len(CHOICE.methods)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Two random layers, 32 wide, and questions."""
    folder = tmp_path_factory.mktemp("pair")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "head_dim": 32}
    config = tiny_config("qwen2", **sizes)
    model = build(config, seed=0)
    model.save_pretrained(folder / "base")
    finetune(model, seed=1, size=0.5)
    model.save_pretrained(folder / "tuned")
    for name in ("base", "tuned"):
        write_tokenizer(folder / name)
    questions = [Question([], f"what is {i}", "abcdefgh"[i:]) for i in range(6)]
    write_questions(folder / "questions.jsonl", questions)
    return Pair(
        name="tuned",
        base=str(folder / "base"),
        finetuned=str(folder / "tuned"),
        calibration=str(write_calibration(folder / "calibration.txt")),
        questions=str(folder / "questions.jsonl"),
        calibration_other=str(write_calibration(folder / "other.txt", 5)),
    )


@pytest.fixture(scope="module")
def limits() -> Limits:
    return Limits(device=torch.device("cpu"), samples=8, embedding_ratio=None)


@pytest.fixture(scope="module")
def filled(pair: Pair, limits: Limits, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Filled]]:
    """Every table, with one seed, fewer rows where they count up, and the slow steps of prinmix left out."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        for name, values in (("ACTIVE", (2, 4)), ("SIZES", (4, 8)), ("HIGHEST", (4, 8))):
            patch.setattr(tables_module, name, values)
        patch.setattr(tables_module, "DISTILL", 2)
        patch.setitem(DEFAULTS, "prinmix", {"alternations": 0, "clipping": False})
        tables = [make(CHOICE, pair) for make in TABLES.values()]
        results = measure(pair, settings_of(tables), [0], limits, out, Console(quiet=True))
    return {table.name: fill(table, results, pair.name) for table in tables}


# Metrics


def test_outliers_are_the_largest_hundredth() -> None:
    outputs = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    mask = outliers(outputs)
    assert int(mask.sum()) == 6
    assert outputs[mask].abs().min() > outputs[~mask].abs().max()
    assert int(outliers(outputs[:1, :3]).sum()) == 1


def test_output_errors_equal_loops_over_elements() -> None:
    generator = torch.Generator().manual_seed(1)
    change, decoded = torch.randn(2, 9, 5, generator=generator)
    inputs = torch.randn(13, 5, generator=generator)
    mask = outliers(torch.randn(13, 9, generator=generator), 0.1)
    wrong, right, wrong_out, right_out = [], [], [], []
    for token in range(13):
        for row in range(9):
            e = float((inputs[token].double() * (change[row] - decoded[row]).double()).sum()) ** 2
            r = float((inputs[token].double() * change[row].double()).sum()) ** 2
            wrong.append(e)
            right.append(r)
            if mask[token, row]:
                wrong_out.append(e)
                right_out.append(r)
    errors = output_errors(change, decoded, inputs, mask)
    assert errors.all == pytest.approx(sum(wrong) / len(wrong), rel=1e-5)
    assert errors.out == pytest.approx(sum(wrong_out) / len(wrong_out), rel=1e-5)
    assert errors.relative == pytest.approx(sum(wrong) / sum(right), rel=1e-5)
    assert errors.relative_out == pytest.approx(sum(wrong_out) / sum(right_out), rel=1e-5)
    # Eq. 1: with H = X X^T the same as the compressor's own measure.
    hessian = Hessian(inputs.T @ inputs)
    assert errors.all * 13 * 9 == pytest.approx(float(hessian.norm(change - decoded).sum()), rel=1e-4)


def test_kl_divergence_equals_torchs() -> None:
    reference, logits = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(2))
    found = kl_divergence(torch.log_softmax(reference, -1), logits)
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(logits, -1), torch.log_softmax(reference, -1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(found.float(), expected)
    assert float(kl_divergence(torch.log_softmax(logits, -1), logits).abs().max()) < 1e-6


def test_thirds_of_28_layers_are_the_papers() -> None:
    thirds = [third(i, 28) for i in range(28)]
    assert thirds == ["low"] * 9 + ["mid"] * 9 + ["high"] * 10


def test_mean_and_deviation() -> None:
    assert mean_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert mean_std([2.0]) == (2.0, None)


# Layers


def test_heldout_activations_are_the_models_own(pair: Pair, limits: Limits) -> None:
    from transformers import AutoModelForCausalLM

    material = Material(pair, limits)
    heldout = Heldout(material)
    found = heldout.layer(0) | heldout.layer(1)
    model = AutoModelForCausalLM.from_pretrained(pair.finetuned, dtype=torch.float32)
    name = "model.layers.1.mlp.down_proj.weight"
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, args, output: seen.append((args[0].flatten(0, 1), output.flatten(0, 1)))
    )
    with torch.no_grad():
        for batch in batches(material.texts):
            model(input_ids=batch.ids)
    torch.testing.assert_close(found[name].inputs, torch.cat([x for x, _ in seen]), rtol=1e-4, atol=1e-5)
    outputs = torch.cat([y for _, y in seen])
    assert outputs[found[name].outliers].abs().min() >= outputs[~found[name].outliers].abs().max() * 0.999
    q, k = (found[f"model.layers.0.self_attn.{x}_proj.weight"].inputs for x in "qk")
    assert q is k


def test_u_by_rows_keeps_to_the_budget() -> None:
    generator = torch.Generator().manual_seed(3)
    dw = (
        torch.randn(128, 24, generator=generator)
        * 0.8 ** torch.arange(24)
        @ torch.randn(24, 128, generator=generator)
    )
    x = torch.randn(512, 128, generator=generator) * torch.linspace(3, 0.1, 128)
    hessian, limit = Hessian(x.T @ x), budget(Fraction(1, 8), 128, 128)
    change, report = RowWise().compress(dw, hessian, limit)
    assert change.bytes <= limit
    wrong = (dw - change.dense()) @ x.T
    assert report["error"] == pytest.approx(float(wrong.square().sum() / (dw @ x.T).square().sum()), rel=1e-3)
    # One width for the strongest and the weakest direction: worse than by directions, and far from nothing.
    _, paper = Paper(solver="exact").compress(dw, hessian, limit)
    assert paper["error"] < report["error"] < 0.05


@pytest.mark.parametrize("u_bits", [2, 5])
def test_one_width_for_u_keeps_to_the_budget(u_bits: int) -> None:
    generator = torch.Generator().manual_seed(4)
    dw, x = torch.randn(128, 128, generator=generator), torch.randn(256, 128, generator=generator)
    limit = budget(Fraction(1, 8), 128, 128)
    factors, _ = Paper(solver="exact", u_bits=u_bits).compress(dw, Hessian(x.T @ x), limit)
    assert set(factors.u_bits.tolist()) == {u_bits}
    assert sum((v + u_bits) * 16 + 8 for v in factors.v_bits.tolist()) <= limit
    with pytest.raises(PrinMixError, match="no width of U"):
        Paper(u_bits=9).check()


# Tables

ROWS = {
    "2": 2 + METHODS,
    "4": 2 * 2,
    "5": 3,
    "6": 2 + 2 * 2,
    "7": 1 + METHODS,
    "8": 5,
    "9": METHODS * 2,
    "10": METHODS * 2,
    "11": METHODS * 4,
    "13": 2 * 2,
    "15": 7 * (1 + METHODS),
    "ablation": 4 + len(PrinMix.steps) * 2 - 1 + 1,
    "compensation": METHODS * 2 * 2,
    "distill": METHODS * 2 * 2,
}


@pytest.mark.parametrize("name", TABLES)
def test_table_has_its_rows(filled: dict[str, list[Filled]], name: str) -> None:
    for part in filled[name]:
        left_out = {"6": 3}.get(name, 0)  # the LoRA rows, and no 1/64 where nothing is reached
        assert len(part.lines) + len(part.skipped) == ROWS[name] + left_out, part.skipped
        assert len(part.lines) >= 2
        for line in part.lines:
            assert set(line.figures) & set(part.columns), line
            assert all(f.mean == f.mean for f in line.figures.values()), line  # no NaN
        assert markdown(part).count("\n|") == len(part.lines) + 2
        Console(quiet=True).print(grid(part))


def test_references_and_methods_are_where_they_should_be(filled: dict[str, list[Filled]]) -> None:
    lines = {line.labels[0]: line.figures for line in filled["2"][0].lines}
    assert lines["fine-tuned"][KL].mean < 1e-6
    assert lines["fine-tuned"][HELD_OUT].mean == 0
    assert lines["base"][HELD_OUT].mean == pytest.approx(100)
    assert lines["base"][KL].mean > lines["prinmix-paper"][KL].mean > 0
    assert lines["prinmix"][HELD_OUT].mean < lines["prinmix-paper"][HELD_OUT].mean < 100
    assert all(lines[m][LINEARS].mean >= 4 for m in CHOICE.methods)
    assert EXACT_MATCH in lines["base"]


def test_delta_come_is_there_with_its_programs_calibration_too(
    pair: Pair, limits: Limits, tmp_path: Path
) -> None:
    table = TABLES["2"](replace(CHOICE, methods=("delta-come",)), pair)
    results = measure(pair, settings_of([table]), [0], limits, tmp_path, Console(quiet=True))
    (filled,) = fill(table, results, pair.name)
    plain, quirk = (line.figures for line in filled.lines if "delta-come" in line.labels[0])
    assert quirk[LINEARS] == plain[LINEARS]
    assert quirk[CALIBRATION].mean != plain[CALIBRATION].mean


def test_thirds_average_the_modules(filled: dict[str, list[Filled]]) -> None:
    """Two layers: no module is low; the mean over types of Table 15 is Table 7's figure."""
    absolute, by_type = filled["7"][0], filled["15"][0]
    base = next(line for line in absolute.lines if line.labels == ("base",))
    assert "low all" not in base.figures
    mine = [line.figures["mid all"].mean for line in by_type.lines if line.labels[1] == "base"]
    assert len(mine) == 7
    assert base.figures["mid all"].mean == pytest.approx(sum(mine) / 7)
    relative = next(line for line in filled["7"][1].lines if line.labels == ("base",))
    assert relative.figures["high out"].mean == pytest.approx(100)


def test_finished_runs_are_taken_over(
    pair: Pair, limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = setting("prinmix-paper", QUARTER), setting("prinmix-paper", QUARTER, rtc=False)
    console = Console(quiet=True)
    before = measure(pair, [first], [0], limits, tmp_path, console)
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"torn')  # as an interrupted write leaves it
    compressed: list[str] = []
    compress = runner_module.compress

    def spy(material: Material, runs: list, *rest: object) -> None:
        compressed.extend(str(run.setting) for run in runs)
        compress(material, runs, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(runner_module, "compress", spy)
    after = measure(pair, [first, second], [0], limits, tmp_path, console)
    assert compressed == ["prinmix-paper rtc=False 1/4"]
    assert after.found[first] == before.found[first]
    assert measure(pair, [first, second], [0], limits, tmp_path, console).found == after.found
    assert len(compressed) == 1
    assert not any((tmp_path / "work").iterdir())


def test_interrupted_run_goes_on_from_its_matrices(
    pair: Pair, limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, limits = [setting("prinmix-paper", QUARTER)], replace(limits, embedding_ratio=QUARTER)
    calls = []
    original = Paper.compress

    def stop_at(count: int | None) -> Callable[..., object]:
        def compress(self: Paper, *args: object) -> object:
            if len(calls) == count:
                raise KeyboardInterrupt
            calls.append(1)
            return original(self, *args)  # type: ignore[arg-type]

        return compress

    monkeypatch.setattr(Paper, "compress", stop_at(5))
    with pytest.raises(KeyboardInterrupt):
        measure(pair, wanted, [0], limits, tmp_path, Console(quiet=True))
    monkeypatch.setattr(Paper, "compress", stop_at(None))
    measure(pair, wanted, [0], limits, tmp_path, Console(quiet=True))
    assert len(calls) == 2 * 7 + 2  # the linears of two layers, embedding and head: each once


def test_what_cannot_reach_the_ratio_is_skipped_with_a_reason(
    pair: Pair, limits: Limits, tmp_path: Path
) -> None:
    table = TABLES["9"](Choice(("prinmix-paper",), ratios=(QUARTER, Fraction(1, 100000))), pair)
    results = measure(pair, settings_of([table]), [0], limits, tmp_path, Console(quiet=True))
    (part,) = fill(table, results, pair.name)
    assert [line.labels[1] for line in part.lines] == ["1/4"]
    (reason,) = part.skipped.values()
    assert "cannot be reached" in reason


def test_mean_over_pairs_and_over_seeds() -> None:
    table = TABLES["5"](CHOICE, SimpleNamespace())  # type: ignore[arg-type]
    result = {"kl": 1.0, "exact_match": 0.5, "errors": {}, "bytes": {}}
    size = {"linears": 1, "linears_dense": 16, "all": 1, "all_dense": 10}
    parts = []
    for kl in (1.0, 3.0):
        found = [result | {"kl": kl + seed, "bytes": size} for seed in range(3)]
        results = Results(dict.fromkeys(settings_of([table]), found), layers=2)
        parts += fill(table, results, "p")
    assert text_of(KL, parts[0].lines[0].figures[KL]) == "2(1)"
    assert text_of(LINEARS, parts[0].lines[0].figures[LINEARS]) == "1/16.0"
    assert text_of(EXACT_MATCH, parts[0].lines[0].figures[EXACT_MATCH]) == "50.0(0.0)"
    mean = average(parts).lines[0].figures[KL]
    assert (mean.mean, mean.std) == (3.0, None)


# Command line


def test_command_writes_everything(pair: Pair, tmp_path: Path) -> None:
    listed = {name: value for name, value in vars(pair).items() if value is not None}
    (tmp_path / "pairs.json").write_text(json.dumps([listed, listed | {"name": "again"}]))
    app = program.typer.Typer()
    app.command()(program.main)
    arguments = (
        "--table 5,7 --ratio 1/4 --seeds 0 --samples 8 --methods prinmix-paper --embeddings exact "
        f"--no-exact-match --device cpu --pairs {tmp_path / 'pairs.json'} --out {tmp_path / 'out'}"
    )
    outcome = CliRunner().invoke(app, arguments.split())
    assert outcome.exit_code == 0, outcome.output
    assert "mean over pairs" in outcome.output
    found = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert [(t["table"], t["pair"]) for t in found["tables"]].count(("5", "again")) == 1
    assert found["machine"]
    page = (tmp_path / "out" / "quality.md").read_text()
    assert "without RTC" in page
    assert "exact match" not in page
    assert (tmp_path / "out" / "table-5.png").stat().st_size > 1000
    assert (tmp_path / "out" / "table-7.png").stat().st_size > 1000
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 3  # the pairs are the same

    wrong = CliRunner().invoke(app, ["--table", "12", "--pairs", str(tmp_path / "pairs.json")])
    assert wrong.exit_code == 1
    assert "12" in wrong.output


def test_bad_pairs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"name": "x", "base": "b", "wrong": 1}]))
    with pytest.raises(PrinMixError, match="other fields"):
        read_pairs(str(path))
    path.write_text("{")
    with pytest.raises(PrinMixError, match="cannot be read"):
        read_pairs(str(path))
    with pytest.raises(PrinMixError, match="nothing to measure on"):
        Pair("x", "b", "f", "c")


def test_pairs_of_benchmarks_pairs_are_read(tmp_path: Path) -> None:
    common = {"task": "shift", "base": "base", "questions": "test.jsonl", "measured": {}}
    texts = {"in-domain": "in.txt", "pretraining": "pre.jsonl"}
    full = common | {"name": "shift", "finetuned": "shift", "calibration": texts, "adapter": None}
    lora = full | {"name": "lora", "finetuned": "lora/merged", "adapter": "lora/adapter"}
    (tmp_path / "pairs.json").write_text(json.dumps([full, lora]))
    (tmp_path / "in.txt").write_text("x")
    first, second = read_pairs(str(tmp_path))
    assert (first.lora, second.lora) == ("lora/merged", None)
    assert (first.calibration, first.calibration_other) == (str(tmp_path / "in.txt"), "pre.jsonl")
    assert first.of_lora().finetuned == "lora/merged"

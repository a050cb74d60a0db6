"""The `prinmix` command: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compress.adapters import write_adapter
from tests.compress.pairs import Pair
from vllm_prinmix import __version__
from vllm_prinmix.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prinmix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``prinmix(*arguments)`` -> (exit code, stdout, stderr) of the command, in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prinmix", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run


def compress_arguments(pair: Pair, out: Path) -> list[object]:
    files = ["--base", pair.base, "--finetuned", pair.finetuned, "--out", out]
    return [
        "compress",
        *files,
        "--calibration",
        pair.calibration,
        "--method",
        "prinmix-paper",
        "--solver",
        "exact",
    ]


def test_compress_inspect_verify_merge(make_pair: Callable[..., Pair], prinmix: Run, tmp_path: Path) -> None:
    pair, delta = make_pair(), tmp_path / "delta"
    code, out, _ = prinmix(
        *compress_arguments(pair, delta), "--ratio", "0.125", "--bits", "0,2,8", "--seed", 3
    )
    assert code == 0
    assert "tuned, a fine-tune of base" in out

    code, out, _ = prinmix("inspect", delta)
    assert code == 0
    assert "layers.1.mlp.down_proj" in out
    assert "linear layers:" in out
    assert "embedding, lm_head:" in out
    assert "whole checkpoint:" in out

    code, out, _ = prinmix("inspect", delta, "--json")
    description = json.loads(out)
    assert code == 0
    assert description["settings"] == {
        "method": "prinmix-paper",
        "options": {
            "bits": [0, 2, 8],
            "max_active_bits": 4,
            "solver": "exact",
            "rtc": True,
            "rank_penalty": 0.0,
            "u_bits": 0,
        },
        "ratio": 0.125,
        "budget": "module",
        "compensated": False,
        "embedding_ratio": 0.25,
    }
    assert description["calibration"]["seed"] == 3
    assert 0.1 < description["ratio"]["linear"]["ratio"] <= 0.125
    module = {m["name"]: m for m in description["modules"]}["model.layers.1.mlp.down_proj.weight"]
    assert {c["v_bits"] for c in module["classes"]} <= {2, 8}
    assert 0 < module["report"]["error"] < 0.1

    code, out, _ = prinmix("verify", delta, "--base", pair.base, "--finetuned", pair.finetuned, "--json")
    assert code == 0
    assert {e["name"]: e for e in json.loads(out)}[module["name"]]["weight_error"] > 0
    code, out, _ = prinmix("verify", delta, "--base", pair.base)
    assert code == 0
    assert "all is well" in out

    merged = tmp_path / "merged"
    code, _, _ = prinmix(
        "merge", "--base", pair.base, "--delta", delta, "--out", merged, "--dtype", "float32"
    )
    assert code == 0
    assert (merged / "model.safetensors").is_file()


def test_compress_and_verify_a_lora_adapter(
    make_pair: Callable[..., Pair], prinmix: Run, tmp_path: Path
) -> None:
    pair, delta = make_pair(), tmp_path / "delta"
    adapter = write_adapter(tmp_path / "style", pair.base)
    source = ["--base", pair.base, "--from-lora", adapter, "--calibration", pair.calibration]
    code, out, _ = prinmix("compress", *source, "--out", delta, "--ratio", "1/32")
    assert code == 0
    assert "style, a fine-tune of base" in out
    code, out, _ = prinmix("verify", delta, *source)
    assert code == 0
    assert "all is well, 14 tensors" in out


def test_report(make_pair: Callable[..., Pair], prinmix: Run, tmp_path: Path) -> None:
    pair, delta, html = make_pair(), tmp_path / "delta", tmp_path / "report.html"
    models = ["--base", pair.base, "--finetuned", pair.finetuned]
    assert prinmix("compress", *models, "--out", delta, "--calibration", "none")[0] == 0
    code, out, _ = prinmix("report", delta)
    assert code == 0
    assert "scales and zero points" in out
    assert "down_proj" in out
    terms = [*models, "--calibration", pair.calibration, "--module", "layers.0.mlp.up_proj"]
    code, out, _ = prinmix("report", delta, "--html", html, *terms)
    assert code == 0
    assert "Scaling and difference" in html.read_text()
    description = (delta / "prinmix_config.json").read_text()
    for path, expected in (
        (delta / "prinmix_config.json", "ends in .html"),
        (tmp_path / "not there" / "report.html", "No such file or directory; to fix: mend that"),
    ):
        code, _, err = prinmix("report", delta, "--html", path)
        assert code == 1
        assert expected in err
        assert str(path) in err
    assert (delta / "prinmix_config.json").read_text() == description
    code, _, err = prinmix("report", delta, "--base", pair.base, "--calibration", "none")
    assert code == 1
    assert "Eq. 5's terms need the two models and data [report]; found: no --finetuned" in err


BAD: dict[str, tuple[Callable[[Pair, Path], list[object]], str]] = {
    "no calibration": (
        lambda p, d: [a for a in compress_arguments(p, d) if a not in ("--calibration", p.calibration)],
        "error: calibration text is required.*--calibration FILE",
    ),
    "no fine-tune": (
        lambda p, d: [a for a in compress_arguments(p, d) if a not in ("--finetuned", p.finetuned)],
        "the fine-tune is needed, once.*found: neither",
    ),
    "two fine-tunes": (
        lambda p, d: [*compress_arguments(p, d), "--from-lora", p.finetuned],
        "the fine-tune is needed, once.*found: both.*--from-lora ADAPTER",
    ),
    "no such base": (
        lambda p, d: [*compress_arguments(p, d), "--base", "nowhere"],
        r"no such checkpoint folder \[nowhere\]",
    ),
    "ratio": (lambda p, d: [*compress_arguments(p, d), "--ratio", "1/x"], r"not a number \[--ratio\].*1/x"),
    "bits": (lambda p, d: [*compress_arguments(p, d), "--bits", "two"], r"cannot be read \[--bits\].*two"),
    "method": (
        lambda p, d: [*compress_arguments(p, d), "--method", "magic"],
        r"\[--method\].*magic.*prinmix-paper",
    ),
    "solver": (lambda p, d: [*compress_arguments(p, d), "--solver", "luck"], r"\[--solver\].*scip or exact"),
    "inspect nothing": (lambda p, d: ["inspect", d], "delta folder does not exist"),
    "inspect no delta": (lambda p, d: ["inspect", p.base], "not a delta folder"),
    "merge dtype": (
        lambda p, d: ["merge", "--base", p.base, "--delta", d, "--out", d, "--dtype", "int4"],
        r"unknown dtype.*int4.*bfloat16",
    ),
    "quirk without data": (
        lambda p, d: [
            *compress_arguments(p, d)[:-3],
            *("delta-come", "--delta-come-quirk", "--calibration", "none"),
        ],
        r"run again on their own outputs \[--method delta-come\]; found: --calibration none",
    ),
    "verify calibration alone": (
        lambda p, d: ["verify", d, "--base", p.base, "--calibration", p.calibration],
        "give --finetuned or --from-lora too",
    ),
}


def test_options_of_the_baselines(make_pair: Callable[..., Pair], prinmix: Run, tmp_path: Path) -> None:
    pair = make_pair()
    cases = {
        "bitdelta": (["--scale", "fitted"], {"scale": "fitted"}, None),
        "gptq": (["--bits", "2", "--without", "clipping"], {"bits": [2], "clipping": False}, None),
        "delta-come": (["--delta-come-quirk"], {"delta_come_quirk": True}, 1 / 16),
    }
    for name, (flags, options, ratio) in cases.items():
        arguments = compress_arguments(pair, tmp_path / name)[:-3]
        code, _, error = prinmix(*arguments, name, *flags)
        assert code == 0, error
        settings = json.loads((tmp_path / name / "prinmix_config.json").read_text())["settings"]
        assert (settings["options"], settings["ratio"]) == (options, ratio)
    code, _, error = prinmix(*arguments, "gpt-zip", "--scale", "mean")
    assert code == 1
    assert "no such option" in error
    assert "--scale" in error


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_message_and_exit_code_1(
    make_pair: Callable[..., Pair], prinmix: Run, tmp_path: Path, case: str
) -> None:
    arguments, message = BAD[case]
    code, out, err = prinmix(*arguments(make_pair(), tmp_path / "delta"))
    assert code == 1
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert "Traceback" not in err


def test_version_and_help_answer_without_torch() -> None:
    code = (
        "import sys; from vllm_prinmix.cli import main\n"
        "try: main()\nexcept SystemExit as done: assert not done.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    for argument, expected in (("--version", f"prinmix {__version__}"), ("--help", "compress")):
        done = subprocess.run(
            [sys.executable, "-c", code, argument], capture_output=True, text=True, check=True, timeout=60
        )
        assert expected in done.stdout


def test_interrupting_says_how_to_go_on(
    make_pair: Callable[..., Pair], prinmix: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    pair = make_pair()
    with monkeypatch.context() as patch:
        patch.setattr("vllm_prinmix.compress.partial.Partial.save", interrupted)
        code, _, err = prinmix(*compress_arguments(pair, tmp_path / "delta"))
    assert code == 130
    assert "the same command goes on" in err
    assert prinmix(*compress_arguments(pair, tmp_path / "delta"))[0] == 0


def test_what_is_unforeseen_is_one_line_too(prinmix: Run, tmp_path: Path) -> None:
    code, _, err = prinmix("inspect", tmp_path / ("x" * 300))
    assert code == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err

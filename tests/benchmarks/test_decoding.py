"""The decoding benchmark: its arithmetic on canned times, and what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import decoding
from vllm_prinmix.errors import PrinMixError


def run(**milliseconds: float) -> dict[str, Any]:
    seconds = {name.replace("_", " "): value / 1e3 for name, value in milliseconds.items()}
    return {"seconds": seconds, "resident_bytes": []}


PLAIN = run(base=50, base_x4=60)
PRINMIX = run(base=50, base_x4=66, tenant=80, tenant_x4=90) | {"resident_bytes": [1000, 1210, 1430]}
PRINMIX["seconds"]["4 tenants"] = 0.075


def test_time_per_token_while_all_streams_run() -> None:
    one = [0.1 * i for i in range(20)]
    assert decoding.token_seconds([one]) == pytest.approx(0.1)
    # Until the second comes at 0.55, and after the first has ended, tokens are twice as fast.
    first = [0.05 * i for i in range(12)] + [0.55 + 0.1 * i for i in range(1, 11)]
    second = [0.55 + 0.1 * i for i in range(11)] + [1.55 + 0.05 * i for i in range(1, 11)]
    assert decoding.token_seconds([first, second]) == pytest.approx(0.1)
    with pytest.raises(PrinMixError, match="do not overlap"):
        decoding.token_seconds([one, [5 + at for at in one]])


def test_longest_gap_leaves_the_first_tokens_out() -> None:
    times = [0.0, 3.0, *(3.0 + 0.1 * i for i in range(1, 10)), 5.0]
    assert decoding.longest_gap([times]) == pytest.approx(1.1)


def test_shares_of_the_plain_servers_speed() -> None:
    summary = decoding.summarize(
        [("plain", PLAIN), ("prinmix", PRINMIX), ("plain", run(base=54, base_x4=60))], 200
    )
    cases = {case["case"]: case for case in summary["cases"]}
    assert cases["base"]["share"] == pytest.approx(52 / 50)
    assert cases["tenant"]["share"] == pytest.approx(52 / 80)
    assert cases["4 tenants"]["share"] == pytest.approx(60 / 75)
    reached = {name: case["reached"] for name, case in cases.items()}
    expected = {"base": True, "base x4": False, "tenant": False, "4 tenants": True, "tenant x4": None}
    assert reached == expected
    assert summary["drift"] == pytest.approx(54 / 50 - 1)
    assert summary["resident_share"] == pytest.approx(430 / 2 / 200)


def test_what_is_shown_and_drawn(tmp_path: Path) -> None:
    summary = decoding.summarize([("plain", PLAIN), ("prinmix", PRINMIX)], 200)
    decoding.plot(summary, tmp_path / "decoding.png")
    assert (tmp_path / "decoding.png").stat().st_size > 10_000
    console = Console(width=120, record=True)
    console.print(decoding.table(summary))
    text = console.export_text()
    for part in ("4 tenants", "75.0", "80 %", "1.07 of it (target 1.15)"):
        assert part in text


def test_every_case_has_something_to_be_measured_against() -> None:
    assert set(decoding.TARGETS) == set(decoding.CASES)
    assert all(set(decoding.CASES[case]) == {"base"} for case, _ in decoding.TARGETS.values())
    assert all(len(decoding.CASES[a]) == len(decoding.CASES[b]) for a, (b, _) in decoding.TARGETS.items())


@pytest.mark.parametrize("arguments", [["--shape", "nothing"], ["--order", "plain"]])
def test_wrong_arguments(arguments: list[str], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(decoding.main)
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert not (tmp_path / "out").exists()

"""The plugin's options: from the command line and from additional_config."""

import argparse
from pathlib import Path

import pytest

from vllm_prinmix import options
from vllm_prinmix.errors import PrinMixError
from vllm_prinmix.options import Options


def parse(*arguments: str) -> Options | None:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return options.from_namespace(parser.parse_args(list(arguments)))


def test_nothing_asked_is_nothing() -> None:
    assert parse() is None


def test_all_options() -> None:
    found = parse("--enable-prinmix", "--deltas", ".", "--max-deltas", "3", "--max-cpu-deltas", "9")
    assert found == Options(deltas=".", max_deltas=3, max_cpu_deltas=9)
    assert found.host_capacity == 9


def test_host_memory_holds_the_slots_by_default() -> None:
    found = parse("--enable-prinmix", "--deltas", ".")
    assert found is not None
    assert found.host_capacity == found.max_deltas == options.DEFAULT_MAX_DELTAS


def test_flag_without_deltas() -> None:
    with pytest.raises(PrinMixError, match="--enable-prinmix is given but --deltas is not"):
        parse("--enable-prinmix")


def test_deltas_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PrinMixError, match="the folder of deltas does not exist.*nowhere"):
        parse("--enable-prinmix", "--deltas", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("option", ["--deltas", "--max-deltas", "--max-cpu-deltas"])
def test_options_without_the_flag(option: str) -> None:
    with pytest.raises(PrinMixError, match=f"{option} is given but --enable-prinmix is not"):
        parse(option, "1")


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("option", ["--max-deltas", "--max-cpu-deltas"])
def test_counts_are_positive(option: str, count: int) -> None:
    with pytest.raises(PrinMixError, match=f"{option}.*found: {count}"):
        parse("--enable-prinmix", "--deltas", ".", f"{option}={count}")


def test_host_memory_not_below_slots() -> None:
    with pytest.raises(PrinMixError, match="--max-cpu-deltas.*found: 2.*at least --max-deltas, 3"):
        parse("--enable-prinmix", "--deltas", ".", "--max-deltas", "3", "--max-cpu-deltas", "2")


def test_mapping_round_trip() -> None:
    chosen = Options("d", 2, 5)
    assert Options.from_mapping(chosen.to_mapping()) == chosen


@pytest.mark.parametrize("fields", [{}, {"max_deltas": 1}, {"deltas": "d", "slots": 3}, "d", None, ["d"]])
def test_bad_mappings_say_what_is_expected(fields: object) -> None:
    with pytest.raises(PrinMixError, match="a mapping with deltas"):
        Options.from_mapping(fields)

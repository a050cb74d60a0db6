"""`make demo` keeps what the README promises of it."""

from __future__ import annotations

import pytest

from benchmarks.demo.pipeline import Family
from vllm_prinmix.format.schema import WEIGHTS_FILE


def test_three_tenants_with_enough_questions(demo_results: dict, family: Family) -> None:
    assert len(demo_results["tenants"]) == len(family.tenants) == 3
    for tenant in family.tenants:
        assert len(tenant.questions) >= 200
        seen = tenant.calibration.read_text()
        assert not [q for q in tenant.questions if q.messages[0]["content"] in seen.splitlines()]


@pytest.mark.parametrize("number", range(3))
def test_quality_and_size(demo_results: dict, family: Family, number: int) -> None:
    tenant = demo_results["tenants"][number]
    match = tenant["exact_match"]
    assert match["base"] <= 0.05
    assert match["finetuned"] > 0.9
    assert match["served"] >= match["finetuned"] - 0.05
    assert tenant["ratio_linear"] <= 1 / 16
    assert tenant["ratio"] <= 0.075
    assert tenant["packed_bytes"] == (family.tenants[number].delta / WEIGHTS_FILE).stat().st_size
    assert tenant["ratio"] == pytest.approx(tenant["packed_bytes"] / tenant["dense_bytes"])
    assert tenant["tokens_equal"] is True

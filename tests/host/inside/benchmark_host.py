"""What `truepose benchmark --host` measures, on a UNet of a tenth of the width."""

from __future__ import annotations

import pytest
from pack.nodes.host_benchmark_steps import Shape, measure


@pytest.fixture(scope="module")
def result() -> dict:
    return measure(quick=True, repeats=1, shape=Shape("tiny", 32, 2, 48, 24, 16))


def test_counted_costs_keep_their_order(result):
    counted = {row["what"]: row["counted"] for row in result["steps"]}
    assert counted["plain"] == 1
    assert counted["all tokens"] > counted["person"] > counted["person, negative row without"] > 1
    assert counted["all tokens"] > counted["all tokens, negative row without"] > counted["person, negative row without"]
    assert counted["person, negative row without, region match"] > counted["person, negative row without"]


def test_the_source_is_read_with_one_row_of_the_two(result):
    counted = {row["what"]: row["counted"] for row in result["steps"]}
    assert counted["reading the source, once"] == pytest.approx(0.5, abs=1e-6)
    both = counted["all tokens"] + counted["reading the source, once"]
    assert counted["all tokens, source read at every step"] == pytest.approx(both)


def test_every_step_was_timed_and_the_person_is_near_the_share(result):
    assert all(row["seconds"] > 0 for row in result["steps"])
    assert result["person"] == pytest.approx(0.4, abs=0.15)
    assert result["source_mb"] > 0

"""What `truepose benchmark --host` measures, on a UNet of a tenth of the width."""

from __future__ import annotations

import pytest
from pack.nodes.host.benchmark.steps import Shape, measure


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
    for tokens in ("all tokens", "person"):
        both = counted[tokens] + counted["reading the source, once"]
        # What is measured is the first step of a run, which projects its keys and values either way.
        assert counted[f"{tokens}, source read at every step"] == pytest.approx(both)


def test_readings_are_shared_by_steps_and_poses(result):
    rows = {(row["tokens"], row["reading"]): row for row in result["runs"]}
    for tokens in ("all tokens", "person"):
        order = ("once", "2 noise levels", "4 noise levels", "8 noise levels", "every step")
        costs = [rows[tokens, reading]["counted_1"] for reading in order]
        assert costs == sorted(costs) and costs[0] < costs[-1]
        four = rows[tokens, "4 noise levels"]
        step = next(row["counted"] for row in result["steps"] if row["what"] == tokens)
        assert four["counted_1"] == pytest.approx(step + 4 * 0.5 / 25)
        assert four["counted_4"] == pytest.approx(step + 4 * 0.5 / 100)
        every = rows[tokens, "every step"]
        assert every["counted_4"] == pytest.approx(step + 0.5, abs=0.02)


def test_every_step_was_timed_and_the_person_is_near_the_share(result):
    assert all(row["seconds"] > 0 for row in result["steps"])
    assert result["person"] == pytest.approx(0.4, abs=0.15)
    assert result["source_mb"] > 0

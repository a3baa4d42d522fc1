"""2,000 damaged files of every kind: each is read or refused with a clear error, in bounded time and memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from mutate import json_of, value_of
from readers import READERS, whole_of

RUN = Path(__file__).with_name("run.py")
CASES = 2000


@pytest.fixture(scope="module")
def results():
    """What the harness says. It bounds the memory of its process, so it has one of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(RUN), "--cases", str(CASES)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [reader.name for reader in READERS])
def test_damaged_files_are_read_or_refused(results, name):
    found = results[name]
    assert found["failures"] == []
    assert found["read"] + found["refused"] == CASES
    # Damage that nobody notices, or that nothing survives, would show nothing.
    assert found["read"] > CASES / 100 and found["refused"] > CASES / 10


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_case_is_the_same_whenever_it_is_made(reader):
    name, content = reader.seeds()[0]
    whole = whole_of(content)
    made = [[reader.damage(content, random.Random(f"{name} {i}")) for i in range(20)] for _ in range(2)]
    assert made[0] == made[1]
    assert sum(damaged != whole for damaged in made[0]) > 10
    assert whole_of(content) == whole


def test_damage_to_values_leaves_the_original_alone():
    value = {"a": [1, 2, {"b": "c"}], "d": None}
    for i in range(200):
        value_of(value, random.Random(i))
        json_of(value, random.Random(i))
    assert value == {"a": [1, 2, {"b": "c"}], "d": None}

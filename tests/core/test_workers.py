"""Jobs on workers: each ends once, whatever its worker does."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from truepose_core.errors import TruePoseError
from truepose_core.workers import Workers, run_jobs


def make(folder: str, deadly: bool):
    """Work that squares; refuses 3, breaks at 5 always and at 7 once, and dies once at 11 where that is allowed."""

    def maker():
        def once(name: str) -> bool:
            path = Path(folder) / name
            if path.exists():
                return False
            path.touch()
            return True

        def work(job: int) -> dict[str, int]:
            if job == 3:
                raise TruePoseError("three is refused")
            if job == 5 or (job == 7 and once("seven")):
                raise RuntimeError(f"{job} broke")
            if deadly and job == 11 and once("eleven"):
                os._exit(1)
            return {"square": job * job}

        return work

    return maker


def check(outcomes, deadly: bool) -> None:
    found = {outcome.job: outcome for outcome in outcomes}
    assert Counter(outcome.job for outcome in outcomes) == Counter(range(20))
    assert found[3].error == "three is refused"
    assert (found[3].tries, found[5].tries, found[7].tries) == (1, 3, 2)
    assert found[5].error == "RuntimeError: 5 broke"
    assert found[11].tries == (2 if deadly else 1)
    assert all(o.value == {"square": o.job**2} for o in outcomes if o.job not in (3, 5))


def test_jobs_here(tmp_path):
    check(list(run_jobs(make(str(tmp_path), False), range(20), Workers())), False)


def test_jobs_on_ray_survive_their_workers(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    check(list(run_jobs(make(str(tmp_path), True), iter(range(20)), Workers(2, cpus=0.5))), True)


def test_workers_that_cannot_be_had_are_told():
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(TruePoseError, match="9999 workers of 1 CPU each need 9999, and there are"):
        list(run_jobs(make("", False), range(2), Workers(9999)))

    def refuse():
        raise TruePoseError("there is no such model")

    def break_down():
        raise RuntimeError("out of everything")

    with pytest.raises(TruePoseError, match=r"a Ray worker cannot start: .*out of everything"):
        list(run_jobs(break_down, range(2), Workers(1, cpus=0.5)))

    for count in (0, 1):
        with pytest.raises(TruePoseError, match="there is no such model"):
            list(run_jobs(refuse, range(2), Workers(count, cpus=0.5)))

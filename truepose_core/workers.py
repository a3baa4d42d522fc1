"""Many jobs on workers: in this process, or on Ray actors, here or on a cluster.

One engine for preparing data and for catalogues. It is Ray's actors and not Ray Data: a job ends by itself, so one that
fails or whose worker dies is done again alone, where Ray Data does a block again, finished jobs and all; and what a job
makes is written by its worker, so nothing but small dictionaries travels. With `count` 0 there is no Ray: the jobs run
one after the other in this process, which is also what the base install can do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from truepose_core.errors import TruePoseError

_log = logging.getLogger(__name__)

Job = TypeVar("Job")
Work = Callable[[Any], dict[str, Any]]
"""What a worker does with a job. It may raise TruePoseError, which is the job's own fault and not tried again."""


@dataclass(frozen=True)
class Workers:
    """How many, and where. count: Ray actors; 0 works in this process. gpus, cpus: that each takes, fractions allowed.
    address: of a running cluster ("auto" finds this machine's); None starts one here for the time of the run.
    retries: how often a job is tried again whose worker died or broke."""

    count: int = 0
    gpus: float = 0.0
    cpus: float = 1.0
    address: str | None = None
    retries: int = 2


@dataclass(frozen=True)
class Outcome(Generic[Job]):
    """A job that ended. value: what the work returned, or None. error: why it failed, or None. tries: how often it was
    begun."""

    job: Job
    value: dict[str, Any] | None
    error: str | None
    tries: int


def run_jobs(make: Callable[[], Work], jobs: Iterable[Job], workers: Workers) -> Iterator[Outcome[Job]]:
    """Do every job once, and yield each as it ends, in no order.

    make: makes a worker's work, once in each worker (that is where models are loaded); it must be picklable with more
    than 0 workers. jobs: taken as workers become free, so they may be many. A TruePoseError of make is raised: no job
    could be done. Raises TruePoseError without Ray where it is needed.
    """
    if workers.count == 0:
        yield from _here(make(), jobs, workers.retries)
    else:
        yield from _on_ray(make, jobs, workers)


def _here(work: Work, jobs: Iterable[Job], retries: int) -> Iterator[Outcome[Job]]:
    for job in jobs:
        for tries in range(1, retries + 2):
            value, error, fault = _attempt(work, job)
            if not fault or tries > retries:
                yield Outcome(job, value, error, tries)
                break


def _attempt(work: Work, job: Job) -> tuple[dict[str, Any] | None, str | None, bool]:
    """(value, error, whether another try may help)."""
    try:
        return work(job), None, False
    except TruePoseError as error:
        return None, str(error), False
    except Exception as error:
        _log.debug("a job failed", exc_info=True)
        return None, f"{type(error).__name__}: {error}", True


class _Actor:
    """What lives in a Ray worker. Its errors are returned: Ray's own would come with remote tracebacks."""

    def __init__(self, make: Callable[[], Work]):
        self.work, self.refused = None, None
        try:
            self.work = make()
        except TruePoseError as error:
            self.refused = str(error)

    def attempt(self, job: Any) -> tuple[dict[str, Any] | None, str | None, bool]:
        """As `_attempt`; "refused" where the worker could not be made."""
        if self.work is None:
            return {"refused": self.refused}, None, False
        return _attempt(self.work, job)


def _on_ray(make: Callable[[], Work], jobs: Iterable[Job], workers: Workers) -> Iterator[Outcome[Job]]:
    ray, started = start_ray(workers.address)
    try:
        _check_room(ray.cluster_resources(), workers)
        yield from _with_actors(ray, make, jobs, workers)
    finally:
        if started:
            ray.shutdown()


def _with_actors(ray: Any, make: Callable[[], Work], jobs: Iterable[Job], workers: Workers) -> Iterator[Outcome[Job]]:
    remote = ray.remote(_Actor).options(num_cpus=workers.cpus, num_gpus=workers.gpus, max_restarts=0)
    waiting = iter(jobs)
    again: list[tuple[Job, int]] = []
    busy: dict[Any, tuple[Any, Job, int]] = {}
    idle = []
    try:
        idle = [remote.remote(make) for _ in range(workers.count)]
        while True:
            while idle:
                job, tries = again.pop() if again else (next(waiting, None), 1)
                if job is None:
                    break
                actor = idle.pop()
                busy[actor.attempt.remote(job)] = (actor, job, tries)
            if not busy:
                return
            (ended,), _ = ray.wait(list(busy), num_returns=1)
            actor, job, tries = busy.pop(ended)
            try:
                value, error, fault = ray.get(ended)
                idle.append(actor)
            except ray.exceptions.RayActorError as died:
                if getattr(died, "actor_init_failed", False):
                    raise TruePoseError(f"a Ray worker cannot start: {_last_line(died)}") from died
                value, error, fault = None, f"its worker died ({_first_line(died)})", True
                idle.append(remote.remote(make))
            if value and value.get("refused"):
                raise TruePoseError(value["refused"])
            if fault and tries <= workers.retries:
                again.append((job, tries + 1))
            else:
                yield Outcome(job, value, error, tries)
    finally:
        for actor in (*idle, *(one for one, _, _ in busy.values())):
            ray.kill(actor)


def _check_room(resources: dict[str, float], workers: Workers) -> None:
    """Raises TruePoseError for more workers than fit: the last ones would wait for ever."""
    for name, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        there = resources.get(name, 0)
        if workers.count * each > there + 1e-6:
            raise TruePoseError(
                f"{workers.count} workers of {each:g} {name} each need {workers.count * each:g}, and there are "
                f"{there:g}; lower --workers, or what each takes"
            )


def start_ray(address: str | None = None) -> tuple[Any, bool]:
    """(Ray, connected to the cluster at the address or to one started here; whether it was not connected before).
    Raises TruePoseError without Ray, and for a cluster that does not answer."""
    try:
        import ray
    except ImportError as error:
        raise TruePoseError(
            '--workers needs Ray; install it with: pip install "comfyui-truepose[scale]", or leave the option out'
        ) from error
    if ray.is_initialized():
        return ray, False
    here = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    except ValueError as error:
        raise TruePoseError(f"Ray cannot start: {_first_line(error)}") from error
    except (ConnectionError, RuntimeError) as error:
        raise TruePoseError(f"the Ray cluster at {address} does not answer: {_first_line(error)}") from error
    return ray, True


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(":. ") if lines else type(error).__name__

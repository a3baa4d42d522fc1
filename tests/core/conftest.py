"""What every core test relies on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# Ray gives its workers the lowest priority; on a busy machine they would hardly run beside the tests.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C works as in a terminal. A shell that starts tests in the background makes them, and every process they
    start, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)

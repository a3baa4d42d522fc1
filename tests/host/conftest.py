"""Fixtures for tests inside a real ComfyUI. Without one, every test here skips and one line says so."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# The workflow maker stands beside what it makes.
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "workflows" / "source")]

from browser import Browser, find_browser  # noqa: E402
from server import PACK, Host, Server  # noqa: E402

from truepose_core.benchmark.host import find_host  # noqa: E402

HOST = find_host(PACK)
# Files that only the host's Python can import; test_inside.py runs them there.
collect_ignore = ["inside", "fixture_pack"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HOST is not None:
        return
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.skip(reason="no ComfyUI"))
    config.stash[_SKIPPED] = len(mine)


_SKIPPED = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(_SKIPPED, 0):
        terminalreporter.write_line(
            f"!!! NO COMFYUI FOUND: {config.stash[_SKIPPED]} host tests did not run. "
            "Set COMFYUI_DIR to a ComfyUI folder (and COMFYUI_PYTHON to its Python).",
            red=True,
            bold=True,
        )
    elif HOST is not None:
        terminalreporter.write_line(f"host tests ran against ComfyUI {HOST.version} in {HOST.folder}")


@pytest.fixture(scope="session")
def host() -> Host:
    """The ComfyUI under test."""
    assert HOST is not None
    return HOST


@pytest.fixture(scope="session")
def photo_libraries(host: Host) -> None:
    """Skip where the host's Python lacks what nodes for photographs want: the pack does not install it."""
    probe = subprocess.run([str(host.python), "-c", "import cv2, onnxruntime"], capture_output=True)
    if probe.returncode:
        pytest.skip(
            f"nodes for photographs want onnxruntime and OpenCV: {host.python} -m pip install onnxruntime opencv-python"
        )


@pytest.fixture(scope="session")
def start_server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Server]:
    """start_server("--cache-none") -> a Server to be used in a `with` block."""

    def start(*args: str) -> Server:
        return Server(host, tmp_path_factory.mktemp("comfy"), args)

    return start


@pytest.fixture(scope="session")
def comfy(start_server: Callable[..., Server]) -> Iterator[Server]:
    """One running server with default arguments, shared by the session."""
    with start_server() as server:
        yield server


@pytest.fixture
def browser(comfy: Server, tmp_path: Path) -> Iterator[Browser]:
    """A headless browser on the shared server's page, ready for a drop."""
    why = find_browser()
    if why is not None:
        pytest.skip(why)
    with Browser(comfy, tmp_path / "profile") as page:
        yield page

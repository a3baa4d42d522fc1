"""The tests of inside/, each a result of its own. They import ComfyUI, so the host's own Python runs them: each file
once, as soon as the first of its tests is asked for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
from server import PACK, Host

from truepose_core.benchmark.host import find_host

INSIDE = Path(__file__).resolve().parent / "inside"
FILES = sorted(f.name for f in INSIDE.glob("*.py") if f.name not in ("conftest.py", "bench.py"))
SECONDS = 900


def run_pytest(host: Host, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The host's pytest in inside/. Node ids are relative to that folder."""
    command = [str(host.python), "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"]
    command += ["--rootdir", str(INSIDE), "--confcutdir", str(INSIDE), *args]
    environment = {**os.environ, "COMFYUI_DIR": str(host.folder), **environment}
    return subprocess.run(command, cwd=INSIDE, capture_output=True, text=True, env=environment, timeout=SECONDS)


@cache
def names(host: Host) -> list[str]:
    """Node ids of all tests. A file that cannot be collected stands for itself, and fails when it is run."""
    found = [line for line in run_pytest(host, "--collect-only", *FILES).stdout.splitlines() if "::" in line]
    found = [line for line in found if line.partition("::")[0] in FILES]
    return found + [file for file in FILES if not any(name.startswith(f"{file}::") for name in found)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    host = find_host(PACK)
    metafunc.parametrize("name", FILES if host is None else names(host))


@dataclass(frozen=True)
class Run:
    """What a file's tests came to. cases: node id -> its element of the JUnit report. left: files left behind."""

    cases: dict[str, ElementTree.Element]
    output: str
    left: list[str]


@pytest.fixture(scope="module")
def run_of(
    host: Host, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    """File name -> its run, with the tests of it that this session wants."""
    if subprocess.run([str(host.python), "-c", "import pytest"], capture_output=True).returncode:
        pytest.skip(f"inside tests need pytest in the host's Python: {host.python} -m pip install pytest")
    here = (item for item in request.session.items if item.path == request.path)
    wanted = [item.callspec.params["name"] for item in here]

    @cache
    def run(file: str) -> Run:
        folder = tmp_path_factory.mktemp(file.removesuffix(".py"))
        report, temporary = folder / "report.xml", folder / "tmp"
        temporary.mkdir()
        chosen = [name for name in wanted if name.partition("::")[0] == file]
        options = (f"--junitxml={report}", "-o", "junit_logging=all")
        try:
            # What a test leaves behind is in a folder that pytest removes.
            done = run_pytest(host, *options, *chosen, TMPDIR=str(temporary))
        except subprocess.TimeoutExpired:
            return Run({}, f"{file} took more than {SECONDS} seconds", [])
        output = done.stdout[-8000:] + done.stderr[-2000:]
        cases = {node_id(case): case for case in ElementTree.parse(report).iter("testcase")} if report.exists() else {}
        return Run(cases, output, [path.name for path in temporary.glob("truepose_host_*")])

    return run


def node_id(case: ElementTree.Element) -> str:
    """`viewing.TestNode` and `test_figures` -> "viewing.py::TestNode::test_figures". A file that is not collected, or
    skips as a whole, is a case without a class."""
    if not case.get("classname"):
        return f"{case.get('name')}.py"
    file, *classes = case.get("classname", "").split(".")
    return "::".join([f"{file}.py", *classes, case.get("name", "")])


def test_inside(name: str, run_of: Callable[[str], Run]) -> None:
    run = run_of(name.partition("::")[0])
    assert not run.left
    case = run.cases.get(name)
    if case is None:
        pytest.fail(f"{name} was not run:\n{run.output}", pytrace=False)
    for skipped in case.iter("skipped"):
        pytest.skip(skipped.text or skipped.get("message", ""))
    wrong = [found for kind in ("failure", "error") for found in case.iter(kind)]
    if wrong:
        printed = [part.text or "" for part in case if part.tag.startswith("system-")]
        pytest.fail("\n".join([*(found.text or "" for found in wrong), *printed]), pytrace=False)

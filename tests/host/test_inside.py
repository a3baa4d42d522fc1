"""Runs the files in inside/ in the host's own Python: they import ComfyUI, which the Python of the tests may lack."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server import Host

INSIDE = Path(__file__).resolve().parent / "inside"
FILES = sorted(f.name for f in INSIDE.glob("*.py") if f.name not in ("conftest.py", "bench.py"))


@pytest.fixture(scope="module")
def has_pytest(host: Host) -> None:
    probe = [str(host.python), "-c", "import pytest"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(f"inside tests need pytest in the host's Python: {host.python} -m pip install pytest")


@pytest.mark.parametrize("file", FILES)
def test_inside(host: Host, has_pytest: None, file: str, tmp_path: Path) -> None:
    command = [str(host.python), "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"]
    command += ["--rootdir", str(INSIDE), "--confcutdir", str(INSIDE), str(INSIDE / file)]
    # What a test leaves behind is in a folder that pytest removes.
    environment = dict(os.environ, COMFYUI_DIR=str(host.folder), TMPDIR=str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    if done.returncode in (0, 5) and " skipped" in done.stdout and " passed" not in done.stdout:
        pytest.skip(f"{file}: {done.stdout.strip().splitlines()[-1]}")
    counted = re.search(r"(\d+) passed", done.stdout)
    print(f"{file} in ComfyUI {host.version}: {done.stdout.strip().splitlines()[-1]}", file=sys.stderr)
    assert not list(tmp_path.glob("truepose_host_*"))
    assert done.returncode == 0 and counted, done.stdout[-8000:] + done.stderr[-2000:]

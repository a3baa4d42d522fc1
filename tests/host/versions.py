"""Runs tests/host in several ComfyUI folders, one after the other, and says which pass: see README.md."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """The exit code: 1 where a version fails."""
    parser = argparse.ArgumentParser(description="tests/host in several versions of ComfyUI")
    parser.add_argument("folders", nargs="+", type=Path, metavar="COMFYUI", help="each with its own .venv or venv")
    parser.add_argument("-k", default="", metavar="NAME", help="only tests of that name, as pytest takes it")
    args = parser.parse_args()
    results = {}
    for folder in args.folders:
        if not (folder / "main.py").is_file():
            parser.error(f"{folder} is no ComfyUI folder: it has no main.py")
        command = [sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "tests/host", "-q", "-k", args.k]
        environment = {**os.environ, "COMFYUI_DIR": str(folder.resolve())}
        results[folder] = subprocess.run(command, cwd=ROOT, env=environment).returncode
    for folder, code in results.items():
        version = (folder / "comfyui_version.py").read_text(encoding="utf-8").split('"')[1]
        print(f"ComfyUI {version} ({folder}): {'passed' if code == 0 else f'FAILED, exit {code}'}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())

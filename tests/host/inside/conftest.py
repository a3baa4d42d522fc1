r"""Tests that import the host. They run in the host's Python (see ../test_inside.py) and never where there is none.

By hand: COMFYUI_DIR=... <the host's python> -m pytest -c /dev/null --confcutdir tests/host/inside \
    --rootdir tests/host/inside tests/host/inside/<file>.py
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).resolve().parent
PACK = HERE.parents[2]
sys.path.insert(0, str(Path(os.environ["COMFYUI_DIR"]).expanduser()))
sys.path.insert(1, str(HERE))
sys.argv = ["main.py"]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = not torch.cuda.is_available()
# Removed when Python ends.
_base = tempfile.TemporaryDirectory(prefix="truepose_host_", ignore_cleanup_errors=True)
comfy.cli_args.args.base_directory = _base.name
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def load_package(name: str, folder: Path) -> ModuleType:
    """Import a folder as a package of that name, as the host imports custom nodes."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load_package("pack", PACK)
load_package("fixtures", HERE.parent / "fixture_pack")
# The host's own module of this name must be the one that is found.
import pack.nodes  # noqa: E402, F401

import nodes  # noqa: E402, F401


@pytest.fixture(autouse=True)
def inference() -> object:
    """Nodes run inside inference mode, so tests do."""
    with torch.inference_mode():
        yield

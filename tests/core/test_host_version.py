"""The pack's own file, which every ComfyUI imports, however old."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = re.search(r'^requires-comfyui = ">=(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]


def pack(monkeypatch: pytest.MonkeyPatch, version: str | None) -> ModuleType:
    """The pack as imported in a ComfyUI of that version; None: outside of it."""
    monkeypatch.delitem(sys.modules, "comfyui_version", raising=False)
    if version is not None:
        monkeypatch.setitem(sys.modules, "comfyui_version", SimpleNamespace(__version__=version))
    spec = importlib.util.spec_from_file_location("truepose_pack", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", ["0.3.9", "0.3.50", "0.2.99"])
def test_an_older_host_is_told_which_one_is_needed(version, monkeypatch, caplog):
    module = pack(monkeypatch, version)
    (record,) = caplog.records
    assert record.levelname == "ERROR" and OLDEST in record.message and version in record.message
    with pytest.raises(RuntimeError, match=re.escape(f"needs ComfyUI {OLDEST} or newer, and this is {version}")):
        asyncio.run(module.comfy_entrypoint())


@pytest.mark.parametrize("version", [OLDEST, f"{OLDEST}-nightly", "0.19.3", "1.0", None])
def test_others_are_told_nothing(version, monkeypatch, caplog):
    assert pack(monkeypatch, version).too_old() is None
    assert not caplog.records


def test_the_readme_names_the_same_version():
    assert f"ComfyUI is to be {OLDEST} or newer" in (ROOT / "README.md").read_text(encoding="utf-8")

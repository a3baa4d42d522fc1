"""The pack on ComfyUI's page, in a headless browser."""

from __future__ import annotations

import json
from pathlib import Path

from browser import Browser
from prompts import transfer


def test_dropped_graph_runs_from_the_page(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "transfer.json"
    file.write_text(json.dumps(transfer()))
    browser.drop(file, wait_for_node="TruePoseApplyHPFA")
    assert {"TruePoseSourceNetEncode", "TruePoseParsingFromMasks", "KSampler"} <= set(browser.node_types())
    sent = browser.api_prompt()
    hpfa = next(n for n in sent.values() if n["class_type"] == "TruePoseApplyHPFA")
    assert hpfa["inputs"]["region_match"] == 2.0 and hpfa["inputs"]["unconditional"] == "drop"
    result = browser.queue()
    assert result["kind"] == "success", result
    errors = [line for line in browser.console() if line.startswith("SEVERE") and "truepose" in line.lower()]
    assert not errors

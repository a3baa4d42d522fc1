"""JSON from strangers: of bounded size, and whatever is wrong with it is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from truepose_core.errors import TruePoseError

MAX_BYTES = 64 * 2**20
_DIGITS = 19
"""Of the longest whole number that 64 bits hold."""


def read_json(path: Path, where: str) -> Any:
    """What a JSON file of at most 64 MiB holds, as `parse_json`. Raises `TruePoseError` when it cannot be read too."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise TruePoseError(f"{where} has {size} bytes; expected at most {MAX_BYTES}. Is it the right file?")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TruePoseError(f"{where} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TruePoseError(f"{where} is not a text file in UTF-8; expected JSON") from error
    return parse_json(text, where)


def parse_json(text: str, where: str) -> Any:
    """What this JSON says. Whole numbers too long for 64 bits become floats, which may be infinite.

    where: names it in errors. Raises `TruePoseError` when it is empty, not JSON, or nested too deeply.
    """
    if not text.strip():
        raise TruePoseError(f"{where} is empty; expected JSON")
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise TruePoseError(f"{where} is not valid JSON for this: it is nested too deeply") from error
    except ValueError as error:
        raise TruePoseError(f"{where} is not valid JSON: {error}") from error


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)

"""Damage for files: bytes that flip, files that are cut, JSON that says something else, all from one generator."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 256, 65_535, 65_536, 1_000_000, 2**31, 2**63, 10**30, 10**400),
    *(0.0, -0.5, 1e-300, 1e300, float("inf"), float("nan")),
    *("", "x", "0", "../x", "\x00", "ä", "\ud800", "x" * 1000, "concat", "pixels"),
    *([], {}, [[]], [1, 2, 3], [[[[[[[[1]]]]]]]], {"a": {"a": {"a": {"a": {"a": 1}}}}}, ["x"] * 300, [0] * 300),
)
"""What stands in a file where nobody expects it."""
DEEP = 20_000
"""Brackets in a row."""
EDGES = (0, 1, 0x7F, 0x80, 0xFF)


def bytes_of(data: bytes, rng: random.Random) -> bytes:
    """The data with one to four things wrong."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(damaged) + 1)
        rng.choice(_DAMAGE)(damaged, at, rng)
    return bytes(damaged)


def _flip(data: bytearray, at: int, rng: random.Random) -> None:
    if data:
        data[at % len(data)] ^= 1 << rng.randrange(8)


def _edge(data: bytearray, at: int, rng: random.Random) -> None:
    if data:
        data[at % len(data)] = rng.choice(EDGES)


def _number(data: bytearray, at: int, rng: random.Random) -> None:
    """A length or a count that is much too large, or none."""
    kind, most = rng.choice((("H", 2**16 - 1), ("I", 2**32 - 1), ("Q", 2**64 - 1)))
    value = rng.choice((0, 1, most, most // 2, most // 2 + 1, rng.randrange(most)))
    new = struct.pack(rng.choice("<>") + kind, value)
    data[at : at + len(new)] = new


def _cut(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at:]


def _remove(data: bytearray, at: int, rng: random.Random) -> None:
    del data[at : at + rng.randrange(1, 64)]


def _repeat(data: bytearray, at: int, rng: random.Random) -> None:
    data[at:at] = data[at : at + rng.randrange(1, 64)]


def _insert(data: bytearray, at: int, rng: random.Random) -> None:
    data[at:at] = rng.randbytes(rng.randrange(1, 16))


_DAMAGE: tuple[Callable[[bytearray, int, random.Random], None], ...] = (
    *(_flip, _flip, _edge, _number, _number, _cut, _remove, _repeat, _insert),
)


def value_of(value: Any, rng: random.Random) -> Any:
    """JSON values with one to three of them changed, lost, doubled or called something else."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(rng.choice(STRANGE))
        holder, key = rng.choice(places)
        what = rng.randrange(8)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", "", f"{key}s", "a" * 300))] = holder.pop(key)
        elif what == 2 and isinstance(holder, list):
            holder.extend(copy.deepcopy(holder[: rng.randrange(4)]))
        elif what == 3 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            # A whole number of hundreds of digits has no half.
            with suppress(OverflowError):
                holder[key] = rng.choice((-1, 2, 1000, 0.5)) * holder[key]
        elif what == 4:
            other, name = rng.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = copy.deepcopy(other[name])
        else:
            holder[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(object or list, key or index) of everything in a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield value, key
        yield from _places(each)


def json_of(value: Any, rng: random.Random) -> str:
    """JSON text of a changed value, or damaged text of the value."""
    what = rng.randrange(20)
    if what == 0:
        return text_of(json.dumps(value), rng)
    if what == 1:
        deep = rng.choice("[{") * DEEP
        return deep.replace("{", '{"a":') + rng.choice(("", "1" + "]" * DEEP))
    text = json.dumps(value_of(value, rng))
    return text.replace(rng.choice("0123456789"), "9" * rng.choice((1, 30, 400, 5000)), 1) if what == 2 else text


def text_of(text: str, rng: random.Random) -> str:
    """Text with something wrong in it."""
    return bytes_of(text.encode("utf-8", "surrogatepass"), rng).decode("latin-1")


def encoded(text: str, rng: random.Random) -> bytes:
    """Text as some program saves it."""
    kind = rng.choice(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "latin-1", "damaged"))
    if kind == "damaged":
        return bytes_of(text.encode("utf-8", "replace"), rng)
    return text.encode(kind, "replace")

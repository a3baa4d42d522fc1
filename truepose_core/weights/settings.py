"""Descriptions of networks in a file's metadata: read by type and within bounds, and compared with the file's tensors
before anything is allocated."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from truepose_core.errors import TruePoseError
from truepose_core.json_text import parse_json

LARGEST = 1 << 16
"""The largest whole number in a description: no width, depth or size of a network of this kind comes near it."""
_LONGEST = 256
"""Items of a list, and entries of an object."""
_DEEPEST = 4
_SPARE = 64
"""Weights that a network may register beyond twice those of its file, while it is built."""

Settings = TypeVar("Settings")


def read_settings(kind: type[Settings], text: str, what: str) -> Settings:
    """The frozen dataclass that this JSON object describes, checked by the types of its fields; what is missing has its
    default. what: names it in errors.

    Raises TruePoseError for text that is no JSON object, unknown or missing settings, a value of another type, a whole
    number that is negative or over `LARGEST`, a number that is not finite, and as `kind` itself.
    """
    return _read_dataclass(kind, parse_json(text, what), what)


def read_values(text: str, what: str) -> dict[str, Any]:
    """The JSON object of settings whose names and types somebody else checks; numbers bounded as in
    `read_settings`."""
    return _read_free(parse_json(text, what), what, required=dict)


def check_described(
    make: Callable[[], nn.Module], shapes: Mapping[str, tuple[int, ...]], where: str, ignore: tuple[str, ...] = ()
) -> None:
    """Raise TruePoseError when the network that `make` builds is not the one whose weights a file holds.

    shapes: name -> shape of the file's tensors. ignore: prefixes of weights that the file does not carry. The network
    is built on the meta device, which allocates nothing, and given up as soon as it has more weights than the file.
    """
    try:
        with torch.device("meta"), _at_most(2 * len(shapes) + _SPARE, where):
            described = {name: tuple(x.shape) for name, x in make().state_dict().items()}
    except TruePoseError:
        raise
    # Values that no network is made of may raise anything in the libraries that build it.
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise TruePoseError(
            f"{where}: its metadata describes a network that cannot be built ({told}); the file is damaged or of "
            "another version: get it again"
        ) from error
    compare_shapes(described, shapes, where, ignore)


def compare_shapes(
    own: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    ignore: tuple[str, ...] = (),
) -> None:
    """Raise TruePoseError, naming the first few, when weights are missing, unknown or of another shape."""
    if ignore:
        own = {name: shape for name, shape in own.items() if not name.startswith(ignore)}
    missing, unknown = sorted(set(own) - set(found)), sorted(set(found) - set(own))
    shapes = [
        f"{name} is {tuple(found[name])}, expected {tuple(own[name])}"
        for name in sorted(set(own) & set(found))
        if tuple(own[name]) != tuple(found[name])
    ]
    problems = [
        f"{len(items)} {label}: {', '.join(items[:6])}{' ...' if len(items) > 6 else ''}"
        for label, items in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if items
    ]
    if problems:
        raise TruePoseError(f"{where}: the weights do not fit the model. " + "; ".join(problems))


@contextmanager
def _at_most(count: int, where: str) -> Iterator[None]:
    """Modules made meanwhile, in this thread, may have this many weights in all."""
    thread, left = threading.get_ident(), count

    def registered(*_: object) -> None:
        nonlocal left
        if threading.get_ident() != thread:
            return
        left -= 1
        if left < 0:
            raise TruePoseError(
                f"{where}: its metadata describes a network of many more weights than the file holds; the file is "
                "damaged: get it again"
            )

    handle = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


def _read_dataclass(kind: type[Settings], value: Any, what: str) -> Settings:
    if not isinstance(value, dict):
        raise TruePoseError(f"{what} is {_shown(value)}; expected an object of settings")
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise TruePoseError(
            f"{what} names unknown settings: {', '.join(name[:60] for name in unknown[:6])}; it was made by a newer "
            "version of this package"
        )
    missing = [
        name
        for name, field in known.items()
        if name not in value and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise TruePoseError(f"{what} lacks {', '.join(missing)}; get or make the file again")
    hints = get_type_hints(kind)
    return kind(**{name: _read(hints[name], each, f"{name} of {what}") for name, each in value.items()})


def _read(hint: Any, value: Any, what: str) -> Any:
    """A JSON value as a field of this type holds it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        (hint,) = (x for x in inner if x is not NoneType)
        return _read(hint, value, what)
    if is_dataclass(hint):
        return _read_dataclass(hint, value, what)
    if origin is dict:
        return _read_free(value, what, required=dict)
    if origin is tuple:
        length = None if inner[-1] is Ellipsis else len(inner)
        if not isinstance(value, list) or len(value) > _LONGEST or length not in (None, len(value)):
            raise TruePoseError(f"{what} is {_shown(value)}; expected a list{f' of {length}' if length else ''}")
        kinds = inner if length else inner[:1] * len(value)
        return tuple(_read(kind, each, what) for kind, each in zip(kinds, value, strict=True))
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise TruePoseError(f"{what} is {_shown(value)}; expected {_NAMES[hint]}")
    _check_number(value, what)
    if hint is int and value < 0:
        raise TruePoseError(f"{what} is {value}; expected 0 or more")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _read_free(value: Any, what: str, *, required: type | None = None, depth: int = 0) -> Any:
    """A JSON value of any type, bounded in depth, length and numbers."""
    if required is not None and not isinstance(value, required):
        raise TruePoseError(f"{what} is {_shown(value)}; expected an object of settings")
    if isinstance(value, (dict, list)) and (depth == _DEEPEST or len(value) > _LONGEST):
        raise TruePoseError(f"{what} is nested too deeply or too long; expected the settings of a network")
    if isinstance(value, dict):
        return {name: _read_free(each, f"{name} of {what}", depth=depth + 1) for name, each in value.items()}
    if isinstance(value, list):
        return [_read_free(each, what, depth=depth + 1) for each in value]
    _check_number(value, what)
    return value


def _check_number(value: Any, what: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise TruePoseError(f"{what} is {value}; expected a finite number")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise TruePoseError(f"{what} is {value}; expected at most {LARGEST}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."

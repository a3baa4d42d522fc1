"""ONNX networks: which provider computes, falling back loudly, and sessions that are reused and released."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    import numpy as np

_log = logging.getLogger(__name__)

# The word we use -> onnxruntime's name, best first.
PROVIDERS: dict[str, str] = {
    "CUDA": "CUDAExecutionProvider",
    "DirectML": "DmlExecutionProvider",
    "CoreML": "CoreMLExecutionProvider",
    "CPU": "CPUExecutionProvider",
}

INSTALL = (
    "install one of them: onnxruntime-gpu (NVIDIA), onnxruntime-directml (any GPU on Windows), onnxruntime (Mac, or no "
    f"GPU), for example `{sys.executable} -m pip install onnxruntime`, and start again. Never two together: each "
    "overwrites the other's files and breaks both; uninstall all of them before changing"
)

# Networks kept open: two parsers, a detector and a pose estimator.
_KEPT = 4

_NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


class _Engine:
    """What changes behind a frozen `OnnxSession`: the runtime's session and the providers not given up yet."""

    def __init__(self, path: Path, providers: list[str]) -> None:
        self.path = path
        self.providers = providers
        self.lock = threading.Lock()
        self._session: Any = None

    def session(self) -> Any:
        """The runtime's session, opened with the first provider that starts."""
        with self.lock:
            while self._session is None:
                try:
                    self._session = _start(self.path, self.providers[0])
                except _runtime_errors() as error:
                    if len(self.providers) == 1:
                        raise TruePoseError(_explain_load(self.path, error)) from error
                    self._give_up("does not start", error)
            return self._session

    def fall_back(self, used: Any, error: Exception) -> bool:
        """Give up the provider of the session `used`. False where none is left."""
        with self.lock:
            if used is self._session:
                if len(self.providers) == 1:
                    return False
                self._session = None
                self._give_up("failed", error)
            return True

    def _give_up(self, what: str, error: Exception) -> None:
        lost = self.providers.pop(0)
        reason = _first_line(error)
        _log.warning("%s %s for %s (%s); falling back to %s", lost, what, self.path.name, reason, self.providers[0])

    def close(self) -> None:
        with self.lock:
            self._session = None


@dataclass(frozen=True, eq=False)
class OnnxSession:
    """An ONNX network ready to run.

    inputs, outputs: name -> shape, None for a side that is free. After `close` the memory is free; a later `run` opens
    the network again.
    """

    path: Path
    inputs: dict[str, tuple[int | None, ...]]
    outputs: dict[str, tuple[int | None, ...]]
    _types: dict[str, str] = field(repr=False)
    _engine: _Engine = field(repr=False)

    @property
    def provider(self) -> str:
        """What computes now: "CUDA", "DirectML", "CoreML" or "CPU"."""
        return self._engine.providers[0]

    def run(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name. Floats are cast to the input's float type.

        A provider that fails falls back to the next, with a warning in the log. Raises `TruePoseError` for inputs that
        are missing, unknown or of another shape, and when the last provider fails too.
        """
        fed = self._checked(arrays)
        while True:
            session = self._engine.session()
            try:
                return dict(zip(self.outputs, session.run(list(self.outputs), fed), strict=True))
            except _runtime_errors() as error:
                if not self._engine.fall_back(session, error):
                    raise TruePoseError(f"{self.path} failed while it ran: {_first_line(error)}") from error

    def _checked(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np

        if set(arrays) != set(self.inputs):
            raise TruePoseError(f"{self.path} takes the inputs {list(self.inputs)}; given were {list(arrays)}")
        fed = {}
        for name, array in arrays.items():
            expected = self.inputs[name]
            sides = zip(array.shape, expected, strict=False)
            if array.ndim != len(expected) or any(want not in (None, side) for side, want in sides):
                raise TruePoseError(f"input {name!r} of {self.path} is {array.shape}; expected {shape_text(expected)}")
            wanted = np.dtype(_NUMPY_TYPES.get(self._types[name], array.dtype))
            if array.dtype != wanted and not (array.dtype.kind == wanted.kind == "f"):
                raise TruePoseError(f"input {name!r} of {self.path} is {array.dtype}; expected {wanted}")
            fed[name] = np.ascontiguousarray(array, dtype=wanted)
        return fed

    def close(self) -> None:
        """Free the network's memory."""
        self._engine.close()


def shape_text(shape: tuple[int | None, ...]) -> str:
    """(None, 3, 512, 512) -> "[any, 3, 512, 512]"."""
    return "[" + ", ".join("any" if side is None else str(side) for side in shape) + "]"


_kept: dict[tuple[str, int, str], OnnxSession] = {}
_kept_lock = threading.Lock()


def open_session(path: Path | str, *, provider: str = "auto") -> OnnxSession:
    """Open an ONNX file, or return the session that is open already (same file, same provider).

    provider: "auto" takes the first of CUDA, DirectML, CoreML and CPU that this onnxruntime has; one of these words
    takes that one, and the CPU where it fails. Raises `TruePoseError` when onnxruntime is missing or lacks the provider
    asked for, and when the file is missing, truncated, not an ONNX model, or needs a newer onnxruntime.
    """
    path = Path(path)
    try:
        stat = path.stat() if path.is_file() else None
    except OSError as error:
        raise TruePoseError(f"ONNX file {path} cannot be read: {error.strerror}") from error
    if stat is None:
        raise TruePoseError(f"there is no ONNX file {path}; check the path")
    providers = _choose(provider)
    key = (str(path.resolve()), stat.st_mtime_ns, providers[0])
    with _kept_lock:
        if key in _kept:
            _kept[key] = _kept.pop(key)
            return _kept[key]
    engine = _Engine(path, providers)
    session = engine.session()
    opened = OnnxSession(
        path,
        inputs={x.name: _shape(x.shape) for x in session.get_inputs()},
        outputs={x.name: _shape(x.shape) for x in session.get_outputs()},
        _types={x.name: x.type for x in session.get_inputs()},
        _engine=engine,
    )
    with _kept_lock:
        _kept[key] = opened
        while len(_kept) > _KEPT:
            _kept.pop(next(iter(_kept)))
    return opened


def close_sessions() -> None:
    """Free the memory of every network that is kept open."""
    with _kept_lock:
        for session in _kept.values():
            session.close()
        _kept.clear()


def available_providers() -> list[str]:
    """The providers of the installed onnxruntime, best first. Raises `TruePoseError` when it is missing."""
    offered = _runtime().get_available_providers()
    return [word for word, name in PROVIDERS.items() if name in offered]


def check_runtime(provider: str = "auto") -> None:
    """Raise TruePoseError where onnxruntime is missing or lacks the provider: before anything is fetched for it."""
    _choose(provider)


def _choose(provider: str) -> list[str]:
    available = available_providers()
    if provider == "auto":
        if "CUDA" not in available:
            _tell_about_gpu()
        return available
    words = {word.lower(): word for word in PROVIDERS}
    word = words.get(provider.lower())
    if word is None:
        raise TruePoseError(f"unknown provider {provider!r}; the providers are auto, {', '.join(PROVIDERS)}")
    if word not in available:
        raise TruePoseError(
            f"this onnxruntime has no {word}, only {', '.join(available)}; take one of them or auto, or {INSTALL}"
        )
    return [word] if word == "CPU" else [word, "CPU"]


def _runtime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise TruePoseError(
            f"this needs onnxruntime, which is not installed or does not load ({error}); {INSTALL}"
        ) from (error)
    if not hasattr(onnxruntime, "InferenceSession"):
        raise TruePoseError(f"onnxruntime is installed but broken; uninstall every onnxruntime package, then {INSTALL}")
    return onnxruntime


@cache
def _tell_about_gpu() -> None:
    import torch

    if torch.version.cuda and torch.cuda.is_available():
        _log.warning("this onnxruntime does not use the NVIDIA GPU; for CUDA, %s", INSTALL)


@cache
def _runtime_errors() -> tuple[type[Exception], ...]:
    """What onnxruntime raises: its own types have no common base."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [x for x in vars(state).values() if isinstance(x, type) and issubclass(x, Exception)]
    return (*own, RuntimeError, ValueError)


def _start(path: Path, provider: str) -> Any:
    import torch

    ort = _runtime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    if provider == "DirectML":
        # onnxruntime's documentation asks for both.
        options.enable_mem_pattern = False
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    if provider == "CUDA" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    names = list(dict.fromkeys((PROVIDERS[provider], PROVIDERS["CPU"])))
    session = ort.InferenceSession(str(path), options, providers=names, enable_fallback=0)
    # A provider whose libraries are missing is left out without an error.
    if PROVIDERS[provider] not in session.get_providers():
        raise RuntimeError("its libraries are missing or of another version")
    return session


def _shape(sides: list[int | str | None] | None) -> tuple[int | None, ...]:
    return tuple(side if isinstance(side, int) else None for side in sides or ())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# How files begin that people save under the name of a model.
_OTHER_FILES = (
    (b"PK\x03\x04", "a PyTorch or zip file"),
    (b"\x80", "a Python pickle"),
    (b"<", "a web page"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself"),
)


def _explain_load(path: Path, error: Exception) -> str:
    """Why onnxruntime does not load a file, and what to do."""
    reason = _first_line(error)
    text = str(error)
    size = path.stat().st_size
    if size == 0:
        return f"{path} is empty (0 bytes); download or copy it again"
    with open(path, "rb") as file:
        head = file.read(64)
    if "opset" in text.lower() or "IR version" in text:
        version = _runtime().__version__
        return (
            f"{path} was made for a newer onnxruntime than {version} ({reason}); update onnxruntime, or export the "
            "model with a lower opset"
        )
    if "xternal" in text and "data" in text:
        return f"{path} keeps its weights in another file that is not beside it ({reason}); put that file beside it too"
    if "INVALID_PROTOBUF" in text or "Protobuf parsing failed" in text:
        # A model begins with its IR version, field 1.
        if head[:1] == b"\x08":
            return f"{path} is truncated or damaged ({size} bytes); download or copy it again"
        kind = next((what for start, what in _OTHER_FILES if head.lstrip().startswith(start)), None)
        told = f"it looks like {kind}" if kind else f"it begins with {head[:8]!r}"
        return f"{path} is not an ONNX model: {told}. Download or export the .onnx file itself"
    return f"{path} cannot be used by this onnxruntime ({_runtime().__version__}): {reason}"

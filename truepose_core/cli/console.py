"""What all commands share: saying things, checking numbers and outputs, choosing a device, measuring a run."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    import torch

MEBI = 2**20
MAX_SIDE = 4096
"""The largest side of a picture to make, in pixels."""
MIN_SIDE = 16
"""The smallest, that of `images`."""
DTYPES = ("auto", "float32", "float16", "bfloat16")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like every other error of the command.

    help_of: whose help they point at; the parser's own by default.
    """

    help_of: str | None = None

    def error(self, message: str) -> NoReturn:
        raise TruePoseError(f"{message}; see {self.help_of or self.prog} --help")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that says the range of every option whose type has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, told = action.help, getattr(action.type, "range", None)
        if not text or told is None:
            return text
        before, default, after = text.rpartition("(default")
        return f"{before}({told}; default{after}" if default else f"{text} ({told})"


class Console(AbstractContextManager["Console"]):
    """Text for people goes to stdout, notes and progress to stderr; with `--json`, stdout holds one JSON object only.

    Warnings that the library logs (a pose without canvas size, ...) become notes. quiet: no progress.
    """

    def __init__(self, json_on_stdout: bool = False, quiet: bool = False):
        self.json_on_stdout, self.quiet = json_on_stdout, quiet
        self.notes: list[str] = []
        self._handler = _NoteHandler(self)
        self._logger = logging.getLogger("truepose_core")

    def __enter__(self) -> Console:
        self._propagate, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._logger.removeHandler(self._handler)
        self._logger.propagate = self._propagate

    def say(self, text: str) -> None:
        """A line for people."""
        if not self.json_on_stdout:
            print(text, flush=True)

    def doing(self, text: str) -> None:
        """What takes a while now, said before it starts."""
        if not self.quiet:
            print(f"{text} ...", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Something to know that is no error. Each is said once."""
        if text not in self.notes:
            self.notes.append(text)
            print(f"note: {text}", file=sys.stderr, flush=True)

    def report(self, values: dict[str, Any]) -> None:
        """The machine-readable result, if it was asked for on stdout."""
        if self.json_on_stdout:
            print(to_json({**values, "notes": self.notes}))


class _NoteHandler(logging.Handler):
    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.note(record.getMessage())


def to_json(values: Any) -> str:
    """Indented JSON; NaN, which JSON does not know, becomes null."""

    def clean(x: Any) -> Any:
        if isinstance(x, dict):
            return {str(k): clean(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [clean(v) for v in x]
        if isinstance(x, float) and not math.isfinite(x):
            return None
        return str(x) if isinstance(x, Path) else x

    return json.dumps(clean(values), indent=2)


def whole(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """An argparse type: a whole number in [low, high]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            upper = f" and at most {high}" if high < 2**63 - 1 else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}{upper}")
        return value

    parse.range = f"{low} to {high}" if high < 2**63 - 1 else f"{low} or more"
    return parse


def number(low: float = 0.0, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number in [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            upper = f" to {high:g}" if high < math.inf else " or more"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {low:g}{upper}")
        return value

    parse.range = f"{low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
    return parse


def height_by_width(text: str) -> tuple[int, int]:
    """An argparse type: HxW in pixels, 16 to 1024 a side -> (height, width)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() and 16 <= int(part) <= 1024 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH of 16 to 1024 pixels, such as 128x96")
    return int(parts[0]), int(parts[1])


height_by_width.range = "16 to 1024 a side"


def picture_size(text: str) -> tuple[int, int]:
    """An argparse type: WxH in pixels -> (width, height)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 512x768")
    width, height = (int(part) for part in parts)
    if not (MIN_SIDE <= width <= MAX_SIDE and MIN_SIDE <= height <= MAX_SIDE):
        raise argparse.ArgumentTypeError(f"{text!r} is out of bounds; each side may be {MIN_SIDE} to {MAX_SIDE} pixels")
    return width, height


picture_size.range = f"{MIN_SIDE} to {MAX_SIDE} a side"


def add_report_arguments(parser: argparse._ActionsContainer) -> None:
    """--json and --quiet, which mean the same in every command."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr; notes and errors stay")


def write_outputs(outputs: Iterable[tuple[Path, Callable[[Path], object]]]) -> None:
    """Write one file after the other. outputs: (path, what writes it there). Raises TruePoseError for the first that
    cannot be written, which also says what is written."""
    written: list[Path] = []
    for path, write in outputs:
        try:
            write(path)
        except TruePoseError as error:
            names = ", ".join(map(str, written[:8])) + (f" and {len(written) - 8} more" if len(written) > 8 else "")
            raise TruePoseError(f"{error}; written so far: {names or 'nothing'}") from error
        written.append(path)


def check_folder(folder: str | Path, names: Iterable[str], overwrite: bool) -> list[Path]:
    """Check, before any work, that these files can be written in the folder, which need not exist yet.

    Returns their paths and makes nothing. Raises TruePoseError as `images.check_output`.
    """
    from truepose_core.pictures.files import check_output

    folder = Path(folder)
    paths = [folder / name for name in names]
    try:
        exists = folder.exists()
    except OSError as error:
        raise TruePoseError(f"the output folder {folder} cannot be reached: {error.strerror}") from error
    if exists and not folder.is_dir():
        raise TruePoseError(f"the output folder {folder} is a file; expected a folder, or a path where one can be made")
    if exists:
        for path in paths:
            _told_about_overwrite(path, overwrite)
    else:
        ancestor = next(parent for parent in folder.absolute().parents if parent.exists())
        if not ancestor.is_dir():
            raise TruePoseError(f"the output folder {folder} cannot be made: {ancestor} is a file")
        check_output(ancestor / folder.absolute().relative_to(ancestor).parts[0])
    return paths


def check_file(path: str | Path, overwrite: bool, suffixes: tuple[str, ...] | None = None) -> Path:
    """Check, before any work, that this file can be written. Raises TruePoseError as `images.check_output`."""
    return _told_about_overwrite(Path(path), overwrite, suffixes)


def _told_about_overwrite(path: Path, overwrite: bool, suffixes: tuple[str, ...] | None = None) -> Path:
    from truepose_core.pictures.files import check_output

    if not overwrite and path.is_file():
        raise TruePoseError(f"output {path} exists already and is kept; choose another path, or add --overwrite")
    return check_output(path, overwrite, suffixes)


def make_folder(folder: Path) -> None:
    """Make the folder and its parents. Raises TruePoseError when that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TruePoseError(f"the output folder {folder} cannot be made: {error.strerror}") from error


def add_device_arguments(parser: argparse._ActionsContainer) -> None:
    """--device and --dtype."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps ...; auto takes an accelerator if there is one (default: auto)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="number format of the networks; auto is float32, and 16 bits for a large model on CUDA (default: auto)",
    )


def choose_device(name: str) -> torch.device:
    """The device called so. Raises TruePoseError when this machine has none."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise TruePoseError(f"--device {name} cannot be used here ({first}); try cpu or auto") from error
    if device.type == "meta":
        raise TruePoseError("--device meta computes nothing; try cpu or auto")
    return device


def choose_dtype(name: str, device: torch.device, large: bool) -> torch.dtype:
    """The number format called so; "auto" takes 16 bits where a large model on CUDA gains by them."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if not large or device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """The most memory this process has held so far, in MiB: "peak_ram_mib" (None where the system does not tell), and
    "peak_gpu_mib" on CUDA."""
    import torch

    memory: dict[str, float | None] = {"peak_ram_mib": _peak_ram()}
    if device.type == "cuda":
        memory["peak_gpu_mib"] = round(torch.cuda.max_memory_allocated(device) / MEBI, 1)
    return memory


def _peak_ram() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return round(peak / (MEBI if sys.platform == "darwin" else 1024), 1)


def memory_text(memory: dict[str, float | None]) -> str:
    """`peak_memory` in words."""
    words = {"peak_ram_mib": "of RAM", "peak_gpu_mib": "of GPU memory"}
    told = [f"{value:,.0f} MiB {words[key]}" for key, value in memory.items() if value is not None]
    return "peak memory " + " and ".join(told) if told else "peak memory unknown on this system"

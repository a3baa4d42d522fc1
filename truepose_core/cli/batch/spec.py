"""The table of a batch: one row is one picture, a source in a pose with options of `truepose transfer`."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from truepose_core.errors import TruePoseError

COLUMNS = ("id", "source", "pose")
"""Columns that are no options; all others are named like one of `truepose transfer`, without the dashes."""
NOT_IN_ROWS = ("out", "overwrite", "json", "quiet", "help", "pose")
"""Options of transfer that a batch sets itself."""
_ID = re.compile(r"[\w][\w .+-]{0,150}")
_YES, _NO = ("true", "yes", "1", "x"), ("false", "no", "0", "")


@dataclass(frozen=True)
class Row:
    """One picture to make. id: the stem of its file. options: (column, cell) of what is given beside, sorted. problem:
    why it cannot be made, known from the table alone."""

    id: str
    source: str
    pose: str
    options: tuple[tuple[str, str], ...] = ()
    problem: str | None = None

    @property
    def group(self) -> tuple[Any, ...]:
        """Rows of one group differ in their pose alone."""
        return self.source, self.options

    def hash(self, base: Sequence[str]) -> str:
        """Of all that the picture depends on but the files' contents. base: the options of all rows."""
        content = json.dumps([self.source, self.pose, self.options, list(base)])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """Rows that a worker does together: one source, one set of options, several poses."""

    rows: tuple[Row, ...]

    @cached_property
    def argv(self) -> list[str]:
        """What they say of transfer's options, without the poses."""
        words: list[str] = []
        for name, cell in self.rows[0].options:
            words += option_words(name, cell)
        return words


def read_spec(path: str | Path, transfer: bool = True) -> list[Row]:
    """The rows of a .csv (UTF-8) or .parquet file with the columns source and pose, perhaps id, and options.

    transfer: columns must be options of transfer; otherwise they may be anything, for a workflow.
    A row that cannot be read or used is a row with a problem, and stops nothing. Without an id rows are called
    row-000001 and so on. Raises TruePoseError for a file of another kind, unknown columns, and ids that stand twice.
    """
    path = Path(path)
    if not path.is_file():
        raise TruePoseError(f"the table {path} does not exist; check the path")
    readers = {".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers:
        raise TruePoseError(f"the table {path} has the suffix {path.suffix!r}; expected .csv or .parquet")
    header, cells = readers[path.suffix.lower()](path)
    _check_header(path, header, transfer)
    rows: list[Row] = []
    places: dict[str, int] = {}
    for number, values in enumerate(cells, 1):
        row = _row(number, header, values, transfer)
        # Some file systems do not tell upper from lower case.
        name = row.id.lower()
        if name in places:
            raise TruePoseError(
                f"{path}: the id {row.id!r} stands twice, in rows {places[name]} and {number}; each names a picture"
            )
        places[name] = number
        rows.append(row)
    if not rows:
        raise TruePoseError(f"{path} has no rows")
    return rows


def _row(number: int, header: Sequence[str], values: Sequence[str] | str, transfer: bool) -> Row:
    """values: the cells, or why the row cannot be read."""
    usual = f"row-{number:06d}"
    if isinstance(values, str):
        return Row(usual, "", "", problem=values)
    if len(values) != len(header):
        return Row(usual, "", "", problem=f"{len(values)} cells, and the first line has {len(header)}")
    cells = dict(zip(header, values, strict=True))
    name = cells.get("id", "") or usual
    if not _ID.fullmatch(name):
        return Row(usual, "", "", problem=f"the id {name[:80]!r} cannot be a file's name; use letters, digits, - and _")
    options = tuple(sorted((column, cell) for column, cell in cells.items() if column not in COLUMNS and cell))
    row = Row(name, cells["source"], cells["pose"], options)
    problem = None
    for column in ("source", "pose"):
        if not cells[column]:
            problem = f"the {column} is empty"
    for column, cell in options if transfer else ():
        try:
            option_words(column, cell)
        except TruePoseError as error:
            problem = str(error)
    return row if problem is None else Row(row.id, row.source, row.pose, options, problem)


def _csv_rows(path: Path) -> tuple[list[str], list[Sequence[str] | str]]:
    rows: list[Sequence[str] | str] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            header = [name.strip() for name in next(reader, [])]
            rows.extend([cell.strip() for cell in row] for row in reader if row)
    except UnicodeDecodeError as error:
        raise TruePoseError(f"{path} is not text in UTF-8; save it as csv in UTF-8") from error
    except (csv.Error, OSError) as error:
        raise TruePoseError(f"{path} cannot be read: {error}") from error
    return header, rows


def _parquet_rows(path: Path) -> tuple[list[str], Iterator[Sequence[str]]]:
    parquet = arrow().parquet
    try:
        table = parquet.read_table(path)
    except Exception as error:
        raise TruePoseError(f"{path} cannot be read as parquet: {error}") from error
    lists = [column.to_pylist() for column in table.columns]
    cells = (["" if value is None else str(value).strip() for value in row] for row in zip(*lists, strict=True))
    return [name.strip() for name in table.column_names], cells


def arrow() -> Any:
    """pyarrow with its parquet. Raises TruePoseError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise TruePoseError(
            'batches write and read parquet with pyarrow; install it with: pip install "comfyui-truepose[scale]"'
        ) from error
    return pyarrow


def _check_header(path: Path, header: Sequence[str], transfer: bool) -> None:
    if not {"source", "pose"} <= set(header):
        raise TruePoseError(f"{path} has the columns {list(header)}; expected source and pose, and perhaps id")
    if len(set(header)) < len(header):
        raise TruePoseError(f"{path} has a column twice: {', '.join(header)}")
    if not transfer:
        return
    known = {name for name in actions() if name not in NOT_IN_ROWS}
    strange = [name for name in header if name not in COLUMNS and name not in known]
    if strange:
        raise TruePoseError(
            f"{path} has a column {strange[0]!r}, which is no option of truepose transfer; expected id, source, pose, "
            "or an option without its dashes, such as seed or source-pose"
        )


@cache
def transfer_parser() -> argparse.ArgumentParser:
    """The parser of `truepose transfer`."""
    from truepose_core.cli import transfer
    from truepose_core.cli.console import Parser

    parser = Parser(prog="truepose transfer", add_help=False)
    transfer.add_arguments(parser)
    return parser


@cache
def actions() -> dict[str, argparse.Action]:
    """The options of transfer, by name without dashes."""
    return {
        text.removeprefix("--"): action
        for action in transfer_parser()._actions
        for text in action.option_strings
        if text.startswith("--")
    }


def option_words(name: str, cell: str) -> list[str]:
    """A cell as words of a command line. A switch is yes or no; an option of several values is split at blanks, with
    quotes as in a shell. Raises TruePoseError for a switch that is neither."""
    action = actions()[name]
    if action.nargs == 0:
        if cell.lower() not in (*_YES, *_NO):
            raise TruePoseError(f"{name} is {cell!r}; expected yes or no")
        return [f"--{name}"] if cell.lower() in _YES else []
    if action.nargs in (None, "?"):
        return [f"--{name}={cell}"]
    try:
        return [f"--{name}", *shlex.split(cell)]
    except ValueError as error:
        raise TruePoseError(f"{name} is {cell!r}: {error}") from error


def group_rows(rows: Sequence[Row], most: int) -> list[Job]:
    """Jobs of at most `most` rows, each of one source and one set of options, in the order of their first rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return [Job(tuple(g[first : first + most])) for g in groups.values() for first in range(0, len(g), most)]

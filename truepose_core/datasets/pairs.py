"""Lists of pairs (source, target) as the published systems write them, and as a shop would.

A list is told by its suffix and what it holds: a csv with the columns `from` and `to` (CFLD, and ours, which may have
`result`), a JSON list of {"source_image", "target_image"} (PCDMs), or lines `target,source,source...` (PIDM's
train_pairs.txt; its README says the order the other way round, its code reads the target first).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from truepose_core.errors import TruePoseError
from truepose_core.json_text import read_json

LIST_SUFFIXES = (".csv", ".json", ".txt", ".lst")
MAX_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Pair:
    """source, target: names of pictures as the list writes them. result: the name of what a model made, or None."""

    source: str
    target: str
    result: str | None = None


def read_pair_list(path: str | Path) -> list[Pair]:
    """The pairs of a list in any of the spellings above, in the file's order.

    A PIDM line with several sources is one pair for each of them. Raises TruePoseError, naming the line, for a file
    that is missing, of another kind, or cannot be read.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in LIST_SUFFIXES:
        raise TruePoseError(
            f"the list of pairs {path} has the suffix {path.suffix!r}; expected a csv with the columns 'from' and 'to' "
            '(CFLD), a .json list of {"source_image", "target_image"} (PCDMs), or a .txt of target,source lines (PIDM)'
        )
    if not path.is_file():
        raise TruePoseError(f"the list of pairs {path} does not exist; check the path")
    if path.stat().st_size > MAX_BYTES:
        raise TruePoseError(f"the list of pairs {path} is over {MAX_BYTES >> 20} MiB; is it the right file?")
    read = {".csv": _read_csv, ".json": _read_json}.get(suffix, _read_lines)
    pairs = read(path)
    if not pairs:
        raise TruePoseError(f"{path} lists no pair")
    return pairs


def read_pairs(table: Path) -> list[tuple[str, str]]:
    """The (from, to) of every row of a csv file in UTF-8, with or without a byte-order mark; blanks around names do not
    count. Raises TruePoseError, naming the line, for a file that is missing or cannot be read."""
    if not table.is_file():
        raise TruePoseError(f"{table} does not exist; expected a csv with the columns 'from' and 'to'")
    pairs = [(pair.source, pair.target) for pair in _read_csv(table)]
    if not pairs:
        raise TruePoseError(f"{table} lists no pair")
    return pairs


def file_stem(name: str) -> str:
    """The name of a listed picture without folders and suffix. Lists write "/" whatever the system."""
    return PurePosixPath(name.replace("\\", "/")).stem


def in_shop_name(path: str) -> str:
    """The flat name that CFLD and PCDMs give a picture of the In-shop folders.

    "img/WOMEN/Dresses/id_00000002/02_1_front.jpg" (what stands before the sex does not matter) becomes
    "fashionWOMENDressesid0000000202_1front.jpg". A name without those four parts is returned as its last part.
    """
    parts = path.replace("\\", "/").split("/")
    if len(parts) < 4 or parts[-4] not in ("MEN", "WOMEN"):
        return parts[-1]
    sex, kind, person, file = parts[-4:]
    number, *rest = file.split("_")
    return "fashion" + sex + kind + person.replace("_", "") + number + "_" + "".join(rest)


def _read_csv(table: Path) -> list[Pair]:
    pairs = []
    try:
        # Strict: a quote that nothing closes is an error, and not the rest of the file.
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, skipinitialspace=True, strict=True)
            header = [name.strip() for name in next(rows, [])]
            if not {"from", "to"} <= set(header):
                raise TruePoseError(f"{table} has the columns {header}; expected 'from' and 'to'")
            columns = [header.index(name) for name in ("from", "to", "result") if name in header]
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise TruePoseError(
                        f"{table}, line {rows.line_num}: {len(row)} columns, and the first line has {len(header)}; "
                        "expected as many. A name with a comma needs quotes"
                    )
                names = [row[column].strip() for column in columns]
                if not all(names):
                    raise TruePoseError(f"{table}, line {rows.line_num}: a name is empty; expected two pictures")
                pairs.append(Pair(*names))
    except UnicodeDecodeError as error:
        raise TruePoseError(
            f"{table} is not text in UTF-8 (byte {error.object[error.start]:#04x}); save it as csv in UTF-8"
        ) from error
    except csv.Error as error:
        raise TruePoseError(
            f"{table}, line {rows.line_num}: {error}; expected two names separated by a comma, and every quote closed"
        ) from error
    except OSError as error:
        raise TruePoseError(f"{table} cannot be read: {error.strerror}") from error
    return pairs


def _read_json(path: Path) -> list[Pair]:
    values = read_json(path, f"the list of pairs {path}")
    if not isinstance(values, list):
        raise TruePoseError(f'{path} is not a list; expected [{{"source_image": ..., "target_image": ...}}, ...]')
    pairs = []
    for i, item in enumerate(values):
        names = [item.get(key) if isinstance(item, dict) else None for key in ("source_image", "target_image")]
        if not all(isinstance(name, str) and name.strip() for name in names):
            raise TruePoseError(
                f'{path}, entry {i}: expected {{"source_image": NAME, "target_image": NAME}}, found {str(item)[:80]!r}'
            )
        pairs.append(Pair(names[0].strip(), names[1].strip()))
    return pairs


def _read_lines(path: Path) -> list[Pair]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise TruePoseError(f"{path} is not text in UTF-8; expected lines target,source,source...") from error
    except OSError as error:
        raise TruePoseError(f"{path} cannot be read: {error.strerror}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        target, *sources = (name.strip() for name in line.split(","))
        if not target or not sources or not all(sources):
            raise TruePoseError(f"{path}, line {number}: {line[:80]!r}; expected target,source,source...")
        pairs += [Pair(source, target) for source in sources]
    return pairs

"""Arrays out of npz files, without ever opening a pickle."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from truepose_core.errors import TruePoseError

_MAX_BYTES = 2**30
_DAMAGED = (OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_npz(path: Path, names: Collection[str], where: str) -> dict[str, np.ndarray | None]:
    """The arrays of an npz file: those in `names` are read, all others are listed with None.

    where: names the file in errors. Raises TruePoseError when the file cannot be read, is damaged, is no npz, or keeps
    one of `names` as a pickle or in more than 1 GiB.
    """
    try:
        if not path.is_file():
            raise TruePoseError(f"{where} does not exist or is not a file; check the path")
        if not path.stat().st_size:
            raise TruePoseError(f"{where} is empty (0 bytes); save it again")
        if not zipfile.is_zipfile(path):
            raise TruePoseError(
                f"{where} is damaged or no npz archive; expected what numpy.savez writes. Pickles (.pkl, and .npy of "
                "dictionaries) are never opened: where you trust one, load it and save its arrays with numpy.savez"
            )
        with np.load(path, allow_pickle=False) as file:
            return {name: _member(file, name, where) if name in names else None for name in file.files}
    except TruePoseError:
        raise
    except _DAMAGED as error:
        raise TruePoseError(f"{where} is damaged or incomplete ({error}); save it again") from error


def _member(file: np.lib.npyio.NpzFile, name: str, where: str) -> np.ndarray:
    size = file.zip.getinfo(f"{name}.npy").file_size
    if size > _MAX_BYTES:
        raise TruePoseError(f"{name} of {where} has {size} bytes; expected at most {_MAX_BYTES}")
    try:
        return file[name]
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise TruePoseError(
            f"{name} of {where} is a pickled object (a dictionary, a sparse matrix, None), and pickles are never "
            "opened. Save it again as plain numbers: a sparse matrix by .toarray(), a dictionary by its values"
        ) from error

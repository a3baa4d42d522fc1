"""Where a batch writes: a folder, or any object store that fsspec knows (s3://, gs://, ...)."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from truepose_core.errors import TruePoseError
from truepose_core.pictures.files import atomic_write

PICTURES, RECORDS = "pictures", "records"
_THREADS = 16


@dataclass(frozen=True)
class Store:
    """A folder on disk or in an object store. A file is there whole or not at all, in both."""

    url: str

    @cached_property
    def local(self) -> Path | None:
        """The folder, None for an object store."""
        return None if "://" in self.url else Path(self.url)

    @cached_property
    def _remote(self) -> tuple[Any, str]:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise TruePoseError(
                f'{self.url} needs fsspec; install it with: pip install "comfyui-truepose[scale]"'
            ) from error
        try:
            return url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise TruePoseError(f"the output {self.url} cannot be opened: {error}") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a file, in place of one that is there. Raises TruePoseError when that fails."""
        if self.local is not None:
            path = self.local / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TruePoseError(f"the folder {path.parent} cannot be made: {error.strerror}") from error
            atomic_write(path, data, overwrite=True)
            return
        system, root = self._remote
        try:
            # An object appears when it is whole.
            system.pipe_file(f"{root.rstrip('/')}/{name}", data)
        except Exception as error:
            raise TruePoseError(f"{self.url}/{name} cannot be written: {error}") from error

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None where there is none. Raises TruePoseError when it cannot be read."""
        try:
            if self.local is not None:
                return (self.local / name).read_bytes()
            system, root = self._remote
            return system.cat_file(f"{root.rstrip('/')}/{name}")
        except FileNotFoundError:
            return None
        except Exception as error:
            raise TruePoseError(f"{self.url}/{name} cannot be read: {error}") from error

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        if self.local is not None:
            return (self.local / name).is_file()
        system, root = self._remote
        try:
            return bool(system.exists(f"{root.rstrip('/')}/{name}"))
        except Exception as error:
            raise TruePoseError(f"{self.url}/{name} cannot be looked up: {error}") from error

    def names(self, folder: str) -> set[str]:
        """The files of a folder; none where it does not exist."""
        if self.local is not None:
            found = self.local / folder
            return {path.name for path in found.iterdir()} if found.is_dir() else set()
        system, root = self._remote
        try:
            return {path.rpartition("/")[2] for path in system.ls(f"{root.rstrip('/')}/{folder}", detail=False)}
        except FileNotFoundError:
            return set()
        except Exception as error:
            raise TruePoseError(f"{self.url} cannot be listed: {error}") from error

    def records(self) -> dict[str, dict[str, Any]]:
        """Every record that is there and whole, by its row's id."""
        names = sorted(name for name in self.names(RECORDS) if name.endswith(".json"))
        with ThreadPoolExecutor(_THREADS) as pool:
            texts = pool.map(lambda name: self.read(f"{RECORDS}/{name}"), names)
            found = {}
            for name, text in zip(names, texts, strict=True):
                try:
                    record = json.loads(text or b"")
                except ValueError:
                    continue
                if isinstance(record, dict) and record.get("id") == name.removesuffix(".json"):
                    found[record["id"]] = record
        return found

    def record(self, record: dict[str, Any]) -> None:
        """Keep what became of a row."""
        self.write(f"{RECORDS}/{record['id']}.json", json.dumps(record).encode())

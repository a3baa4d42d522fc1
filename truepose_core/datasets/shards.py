"""Reading a prepared data set: any sample by its key, without unpacking the shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truepose_core.datasets.pairs import read_pairs
from truepose_core.datasets.prepare import MANIFEST, read_manifest
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.pictures.files import refusing_damage
from truepose_core.pose import Person, read_pose

PICTURES = ("jpg", "png", "webp")


@dataclass(frozen=True)
class Prepared:
    """A picture of a prepared data set. image: [1, 3, H, W] in [0, 1]. parsing: of the same size. person: normalised
    keypoints."""

    image: Tensor
    parsing: HumanParsing
    person: Person


def is_prepared(folder: str | Path) -> bool:
    """Whether a folder holds what `truepose data prepare` made."""
    return (Path(folder) / MANIFEST).is_file()


@dataclass(frozen=True)
class Shards:
    """The samples of a prepared data set. Only the places of the files in the shards are kept in memory.

    Raises TruePoseError, on the first reading, for a folder without a manifest or of another version, and for shards
    that are missing or of another size than it says.
    """

    folder: Path

    def pairs(self, split: str = "train") -> list[tuple[str, str]]:
        """(source key, target key) of a split. Raises TruePoseError where there is none."""
        return read_pairs(self.folder / f"pairs-{split}.csv")

    def keys(self) -> list[str]:
        """Of all samples, sorted."""
        return sorted(self._places)

    def read(self, key: str) -> dict[str, bytes]:
        """The parts of a sample: suffix -> bytes. Raises TruePoseError for a key that is not there."""
        if key not in self._places:
            raise TruePoseError(f"{self.folder} holds no sample {key!r}")
        shard, parts = self._places[key]
        found = {}
        with open(self.folder / shard, "rb") as file:
            for suffix, (offset, size) in parts.items():
                file.seek(offset)
                found[suffix] = file.read(size)
        return found

    def load(self, key: str) -> Prepared:
        """Picture, parsing and keypoints of a sample. Raises TruePoseError where they are damaged."""
        parts, where = self.read(key), f"sample {key} of {self.folder}"
        picture = next((parts[suffix] for suffix in PICTURES if suffix in parts), None)
        if picture is None or not {"parsing.png", "pose.json"} <= set(parts):
            raise TruePoseError(f"{where} has the parts {sorted(parts)}; expected a picture, parsing.png and pose.json")
        with refusing_damage(where):
            image = _pixels(picture, "RGB").permute(2, 0, 1)[None] / 255
            labels = _pixels(parts["parsing.png"], "L").long()[None]
            frame = json.loads(parts["pose.json"])
        return Prepared(image, HumanParsing.from_labels(labels), read_pose(frame)[0].person())

    @cached_property
    def _places(self) -> dict[str, tuple[str, dict[str, tuple[int, int]]]]:
        """key -> (shard, suffix -> (offset, size))."""
        places: dict[str, tuple[str, dict[str, tuple[int, int]]]] = {}
        for about in read_manifest(self.folder)["shards"]:
            path = self.folder / about["name"]
            if not path.is_file() or path.stat().st_size != about["bytes"]:
                raise TruePoseError(
                    f"the shard {path} is missing or cut short; run truepose data prepare again, which makes it anew"
                )
            for name, place in _members(path):
                key, _, suffix = name.partition(".")
                places.setdefault(key, (about["name"], {}))[1][suffix] = place
        return places


def _members(path: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                yield member.name, (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise TruePoseError(f"the shard {path} is damaged ({error}); run truepose data prepare again") from error


def _pixels(data: bytes, mode: str) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        return torch.from_numpy(np.array(image.convert(mode)))

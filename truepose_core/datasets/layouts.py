"""Where a data set's pictures, keypoints, parsings and pairs are: published layouts, a shop's own folders.

deepfashion: the In-shop pictures as they come (MEN/, WOMEN/) or flat, with the files of one of three systems:

    cfld    fashion-resize-pairs-{train,test}.csv (also spelled fasion-...), fashion-resize-annotation-{train,test}.csv
    pidm    {train,test}_pairs.txt, pose/.../NAME.txt
    pcdms   {train,test}_data.json, normalized_pose_txt/NAME.txt

folder: pairs.csv with images/, parsing/ and poses/; or photos grouped in folders, one per garment or person, where
every two pictures of a folder are a pair. Where there are any, parsings lie in parsing/STEM.png and poses in
poses/STEM.json.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path

from truepose_core.datasets.keypoints import read_annotations
from truepose_core.datasets.pairs import Pair, file_stem, in_shop_name, read_pair_list
from truepose_core.errors import TruePoseError
from truepose_core.pose import Person

LAYOUTS = ("cfld", "pidm", "pcdms")
SPLITS = ("train", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_WHOLE = ("all_data_png", "train_all_png", "img", "img_highres", "MEN", "WOMEN", "train_highres", "test_highres")
"""Folders of the same pictures in the published layouts, the largest pictures first."""
_NO_PICTURES = {"parsing", "poses", "pose"}


@dataclass(frozen=True)
class Record:
    """One picture to prepare. key: its name in the shards. name: as the lists write it. picture: the file, None for a
    mannequin. person: its keypoints, where a table has them; else pose: their file, or None. parsing: a label map, or
    None. group: its garment or person, "" where nothing says. problem: why it cannot be prepared."""

    key: str
    name: str
    picture: Path | None
    person: Person | None = None
    pose: Path | None = None
    parsing: Path | None = None
    group: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """What a data set holds. records: by key, in the order of the keys. pairs: split -> (source key, target key).
    layout: how it was laid out."""

    layout: str
    records: dict[str, Record]
    pairs: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def key_of(name: str) -> str:
    """The key of a listed picture: its flat stem; WebDataset ends a key at the first dot."""
    return file_stem(in_shop_name(name)).replace(".", "_")


def read_deepfashion(root: Path, layout: str | None = None) -> Source:
    """The In-shop pictures with the pairs and keypoints of one system.

    layout: of `LAYOUTS`, needed where the files of several are there. A picture that a list names and that does not
    exist, or has no keypoints in a table that has the others', becomes a record with a problem.
    Raises TruePoseError for a folder that is none of them.
    """
    _check_root(root)
    lists = {kind: _pair_files(root, kind) for kind in LAYOUTS}
    there = [kind for kind, found in lists.items() if found]
    if layout is None and len(there) != 1:
        if not there:
            raise TruePoseError(
                f"{root} holds no list of pairs; expected fashion-resize-pairs-train.csv (CFLD), train_pairs.txt "
                "(PIDM) or train_data.json (PCDMs), for train, test or both. Photos of your own: truepose data prepare "
                "folder"
            )
        raise TruePoseError(f"{root} holds the lists of {' and '.join(there)}; choose one with --layout")
    kind = layout or there[0]
    if not lists[kind]:
        raise TruePoseError(
            f"{root} holds no list of pairs of the layout {kind}; it holds {', '.join(there) or 'none'}"
        )
    pairs = {split: read_pair_list(path) for split, path in lists[kind].items()}
    index = _index(root)
    people = _annotations(root, pairs) if kind == "cfld" else None
    records: dict[str, Record] = {}
    for name in _names(pairs.values()):
        key = key_of(name)
        if key in records and in_shop_name(records[key].name) != in_shop_name(name):
            raise TruePoseError(f"{records[key].name} and {name} would both be called {key}; rename one of them")
        records.setdefault(key, _record(root, kind, key, name, index, people))
    return Source(kind, dict(sorted(records.items())), _keyed(pairs))


def _record(
    root: Path, kind: str, key: str, name: str, index: dict[str, Path], people: dict[str, Person] | None
) -> Record:
    path = index.get(key)
    group = key.rpartition("id")[2][:8] if "id" in key else ""
    if path is None:
        return Record(key, name, None, group=group, problem="the picture does not exist")
    parsing = root / "parsing" / f"{path.stem}.png"
    made = {"parsing": parsing if parsing.is_file() else None, "group": group}
    if people is not None:
        person = people.get(key)
        problem = None if person is not None else "the annotations have no keypoints of it"
        return Record(key, name, path, person=person, problem=problem, **made)
    return Record(key, name, path, pose=_pose_text(root, kind, name), **made)


def _pose_text(root: Path, kind: str, name: str) -> Path | None:
    if kind == "pidm":
        candidates = [Path(name.replace("img/", "pose/")).with_suffix(".txt")]
    else:
        candidates = [Path("normalized_pose_txt") / f"{stem}.txt" for stem in (file_stem(name), key_of(name))]
    return next((root / path for path in candidates if (root / path).is_file()), None)


def _pair_files(root: Path, kind: str) -> dict[str, Path]:
    names = {
        "cfld": lambda split: (f"fashion-resize-pairs-{split}.csv", f"fasion-resize-pairs-{split}.csv"),
        "pidm": lambda split: (f"{split}_pairs.txt",),
        "pcdms": lambda split: (f"{split}_data.json",),
    }[kind]
    found = {}
    for split in SPLITS:
        path = next((root / name for name in names(split) if (root / name).is_file()), None)
        if path is not None:
            found[split] = path
    return found


def _annotations(root: Path, pairs: dict[str, list[Pair]]) -> dict[str, Person]:
    """Keypoints by key, of the splits that have pairs."""
    people: dict[str, Person] = {}
    for split in pairs:
        names = [f"{word}-resize-annotation-{split}.csv" for word in ("fashion", "fasion")]
        path = next((root / name for name in names if (root / name).is_file()), root / names[0])
        people |= {key_of(name): person for name, person in read_annotations(path).items()}
    return people


def read_folder(root: Path) -> Source:
    """A shop's own photos: `pairs.csv` with images/, or folders of photos of one garment or person each.

    Raises TruePoseError for a folder of another kind, and where two pictures would have one key.
    """
    _check_root(root)
    table = root / "pairs.csv"
    if table.is_file():
        pairs = {"train": read_pair_list(table)}
        records = {}
        for name in _names(pairs.values()):
            path = root / "images" / name
            problem = None if path.is_file() else "the picture does not exist"
            _add(records, root, name, path, "", problem)
        return Source("pairs.csv", dict(sorted(records.items())), _keyed(pairs))
    groups: dict[str, list[str]] = {}
    records = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name not in _NO_PICTURES):
        for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
            name = path.relative_to(root).as_posix()
            groups.setdefault(folder.name, []).append(_add(records, root, name, path, folder.name, None))
    if not records:
        raise TruePoseError(
            f"{root} holds neither pairs.csv nor folders of pictures; expected one folder per garment or person with "
            f"its photos ({', '.join(SUFFIXES)}), or pairs.csv (columns from and to) with images/"
        )
    keyed = [pair for names in groups.values() for pair in permutations(names, 2)]
    return Source("groups", dict(sorted(records.items())), {"train": keyed})


def _add(records: dict[str, Record], root: Path, name: str, path: Path, group: str, problem: str | None) -> str:
    """A record of `read_folder`; returns its key."""
    key = f"{group}-{path.stem}".replace(".", "_") if group else key_of(name)
    if key in records and records[key].picture != path:
        raise TruePoseError(f"{records[key].picture} and {path} would both be called {key}; rename one of them")
    beside = (root, path.parent) if group else (root,)
    pose = [folder / "poses" / f"{path.stem}.json" for folder in beside] + (
        [path.with_suffix(".json")] if group else []
    )
    parsing = [folder / "parsing" / f"{path.stem}.png" for folder in beside]
    first = {
        what: next((file for file in files if _is_file(file)), None)
        for what, files in (("pose", pose), ("parsing", parsing))
    }
    records[key] = Record(key, name, path, group=group, problem=problem, **first)
    return key


def mannequin_source(people: int, poses: int, split: str = "train") -> Source:
    """People of the mannequin world in several poses each; every two pictures of one person are a pair."""
    if people < 1 or poses < 1:
        raise TruePoseError(f"{people} people in {poses} poses; expected at least 1 of both")
    records, pairs = {}, []
    for person in range(people):
        keys = [f"person{person:06d}-pose{pose:02d}" for pose in range(poses)]
        records |= {key: Record(key, key, None, group=str(person)) for key in keys}
        pairs += permutations(keys, 2)
    return Source("mannequin", records, {split: list(pairs)})


def _is_file(path: Path) -> bool:
    # A name may be longer than any file's.
    try:
        return path.is_file()
    except OSError:
        return False


def _check_root(root: Path) -> None:
    if not root.is_dir():
        raise TruePoseError(f"{root} is not a folder; expected the folder of the data set")


def _names(lists: Iterable[list[Pair]]) -> Iterator[str]:
    for pairs in lists:
        for pair in pairs:
            yield pair.source
            yield pair.target


def _keyed(pairs: dict[str, list[Pair]]) -> dict[str, list[tuple[str, str]]]:
    return {split: [(key_of(p.source), key_of(p.target)) for p in listed] for split, listed in pairs.items()}


def _index(root: Path) -> dict[str, Path]:
    """Key -> the picture of that key under the root; of the same picture in several sizes the largest.

    Raises TruePoseError where two files of one kind of folder have one key.
    """
    found: dict[str, tuple[int, Path]] = {}
    for folder, _, names in sorted(os.walk(root)):
        top = Path(folder).relative_to(root).parts[:1]
        if top and top[0] in _NO_PICTURES:
            continue
        rank = _WHOLE.index(top[0]) if top and top[0] in _WHOLE else len(_WHOLE)
        for name in sorted(names):
            path = Path(folder) / name
            if path.suffix.lower() not in SUFFIXES:
                continue
            key = key_of(path.as_posix())
            if key in found and found[key][0] == rank:
                raise TruePoseError(f"{found[key][1]} and {path} would both be called {key}; remove one of them")
            if key not in found or rank < found[key][0]:
                found[key] = rank, path
    return {key: path for key, (_, path) in found.items()}

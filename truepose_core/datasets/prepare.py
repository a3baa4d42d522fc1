"""Preparing a data set once: every picture parsed, posed and lifted to a body, in WebDataset shards with a manifest.

A sample is KEY.jpg (or .png, .webp: the picture's own bytes), KEY.parsing.png (regions 0 to 6), KEY.pose.json
(POSE_KEYPOINT), KEY.body.npy (theta 72, beta 10, camera 3: `BodyPose`) and KEY.json (name, group, size, sha256), with a
VAE also KEY.latents.npy. The work is cut into shards before it starts, by the keys' order. A shard is written whole or
not at all and is the same bytes whoever writes it; what is there is not done again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from truepose_core.datasets.keypoints import pose_of, read_any_pose
from truepose_core.datasets.layouts import Record, Source
from truepose_core.errors import TruePoseError
from truepose_core.json_text import read_json
from truepose_core.parsing import HumanParsing
from truepose_core.pictures.files import atomic_write, image_size, load_image, whole_file
from truepose_core.pose import Person, body_tensor, write_pose
from truepose_core.workers import Workers, run_jobs

if TYPE_CHECKING:
    from truepose_core.body.pose import BodyPose
    from truepose_core.mannequin.render import Rendering

VERSION = 1
MANIFEST = "manifest.json"
SHARD_SIZE = 500
KEYPOINTS = "keypoints"
_BODY = 85
"""Numbers of a body: 72 of theta, 10 of beta, 3 of the camera."""


@dataclass(frozen=True)
class Options:
    """What a sample holds and how it is made; a shard made with others is another shard.

    parser: "keypoints", a known network, or a file; of pictures that come without a label map. labels: what the numbers
    of label maps mean. estimate_pose: find keypoints with DWPose where there are none. models: the folder of the
    networks. vae: a folder of a VAE for latents, of pictures fitted to `size` (height, width). size, seed, poses and
    split: of mannequins.
    """

    parser: str = KEYPOINTS
    labels: str = "regions"
    estimate_pose: bool = False
    models: str | None = None
    vae: str | None = None
    size: tuple[int, int] | None = None
    seed: int = 0
    poses: int = 2
    split: str = "train"


@dataclass(frozen=True)
class Shard:
    """One job: the records of one file."""

    number: int
    records: tuple[Record, ...]
    folder: str
    plan: str

    @property
    def name(self) -> str:
        return f"shard-{self.number:06d}"


@dataclass(frozen=True)
class Sample:
    """A picture with all that is made of it. parts: suffix -> bytes."""

    key: str
    parts: dict[str, bytes]


def prepare(
    source: Source,
    out: Path,
    options: Options,
    *,
    shard_size: int = SHARD_SIZE,
    workers: Workers | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the shards, the lists of pairs and the manifest. Returns what the manifest holds.

    Started again with the same source and options it does what is missing and ends with the same files. A picture that
    cannot be prepared stops nothing: it is left out, its pairs too, and the manifest says why. progress: called with
    (pictures done, pictures in all).

    Raises TruePoseError for a folder that holds something else, or that another version or other options made; when
    every picture failed; and when a shard could not be written, after all others were.
    """
    plan = _plan(source, options, shard_size)
    _check_folder(out, plan)
    out.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(source, out, shard_size, plan))
    done = {shard.number: found for shard in shards if (found := _finished(shard)) is not None}
    total = sum(len(shard.records) for shard in shards)
    count = sum(len(shard.records) for shard in shards if shard.number in done)
    report = progress or (lambda *_: None)
    report(count, total)
    refused: dict[str, str] = {}
    missing = [shard for shard in shards if shard.number not in done]
    if missing:
        for outcome in run_jobs(_Maker(options, source.layout), missing, workers or Workers()):
            if outcome.error is not None:
                refused[outcome.job.name] = outcome.error
            else:
                done[outcome.job.number] = outcome.value
            count += len(outcome.job.records)
            report(count, total)
    if refused:
        name, why = min(refused.items())
        raise TruePoseError(
            f"{len(refused)} of {len(shards)} shards could not be written, first {name}: {why}. What is written stays; "
            "the same command goes on"
        )
    return _finish(source, out, options, plan, [done[shard.number] for shard in shards])


def _plan(source: Source, options: Options, shard_size: int) -> str:
    """A hash of what is to be made, but for where the pictures lie."""
    records = [[r.key, r.name, r.group, r.problem] for r in source.records.values()]
    words = {name: value for name, value in asdict(options).items() if name != "models"}
    content = {"version": VERSION, "layout": source.layout, "size": shard_size, "options": words, "records": records}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_folder(out: Path, plan: str) -> None:
    if out.exists() and not out.is_dir():
        raise TruePoseError(f"the output {out} is a file; expected a folder, or a path where one can be made")
    manifest = out / MANIFEST
    if manifest.is_file():
        made = read_manifest(out)
        if made["plan"] != plan:
            raise TruePoseError(
                f"{out} holds a data set of other pictures or options ({made['layout']}, {made['counts']['pictures']} "
                "pictures); choose another folder, or remove it"
            )
        return
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if not path.name.startswith(("shard-", "pairs-", ".truepose-")):
            raise TruePoseError(f"the folder {out} holds {path.name}, which is no shard; choose an empty folder")
        if path.suffix == ".json" and plan not in path.read_text(encoding="utf-8", errors="replace"):
            raise TruePoseError(f"{out} holds shards of other pictures or options; choose another folder, or remove it")


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a prepared data set. Raises TruePoseError for none, or one of another version."""
    path = out / MANIFEST
    values = read_json(path, f"the manifest {path}")
    if not isinstance(values, dict) or not isinstance(values.get("version"), int):
        raise TruePoseError(f"{path} is no manifest of a prepared data set")
    if values["version"] != VERSION:
        raise TruePoseError(
            f"{path} is of version {values['version']}; this truepose reads and writes version {VERSION}. Prepare the "
            "data set again in another folder"
        )
    if not {"plan", "layout", "counts", "shards"} <= set(values):
        raise TruePoseError(f"{path} lacks plan, layout, counts or shards; it is damaged")
    return values


def _shards(source: Source, out: Path, size: int, plan: str) -> Iterator[Shard]:
    records = list(source.records.values())
    for number, first in enumerate(range(0, len(records), size)):
        yield Shard(number, tuple(records[first : first + size]), str(out), plan)


def _finished(shard: Shard) -> dict[str, Any] | None:
    """What the shard's own file says, if it is this shard's and the tar beside it is the one it tells of."""
    folder = Path(shard.folder)
    note, tar = folder / f"{shard.name}.json", folder / f"{shard.name}.tar"
    if not (note.is_file() and tar.is_file()):
        return None
    try:
        told = read_json(note, f"{note}")
    except TruePoseError:
        return None
    if not isinstance(told, dict) or told.get("plan") != shard.plan or told.get("bytes") != tar.stat().st_size:
        return None
    return told if told.get("sha256") == _file_hash(tar) else None


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _finish(source: Source, out: Path, options: Options, plan: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    made = {key for shard in shards for key in shard["keys"]}
    failures = [failure for shard in shards for failure in shard["failures"]]
    if not made:
        raise TruePoseError(
            f"none of {len(failures)} pictures could be prepared; the first: {failures[0]['name']}: "
            f"{failures[0]['reason']}"
        )
    counts: dict[str, Any] = {"pictures": len(made), "failures": len(failures), "shards": len(shards), "pairs": {}}
    dropped = {}
    for split, pairs in source.pairs.items():
        kept = [pair for pair in pairs if made.issuperset(pair)]
        counts["pairs"][split], dropped[split] = len(kept), len(pairs) - len(kept)
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("from", "to"), *kept])
        atomic_write(out / f"pairs-{split}.csv", table.getvalue(), overwrite=True)
    counts["pairs left out"] = dropped
    manifest = {
        "version": VERSION,
        "layout": source.layout,
        "plan": plan,
        "counts": counts,
        "reasons": dict(Counter(failure["reason"] for failure in failures).most_common()),
        "failures": failures,
        "shards": [{k: shard[k] for k in ("name", "count", "bytes", "sha256")} for shard in shards],
        "options": asdict(options),
        "versions": _versions(),
    }
    atomic_write(out / MANIFEST, json.dumps(manifest, indent=2) + "\n", overwrite=True)
    return manifest


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from truepose_core import __version__

    return {"truepose": __version__, **{name: version(name) for name in ("torch", "webdataset", "pillow")}}


# ------------------------------------------------------------------------------------------------- in a worker


@dataclass(frozen=True)
class _Maker:
    """Makes what a worker does with a shard."""

    options: Options
    layout: str

    def __call__(self) -> Callable[[Shard], dict[str, Any]]:
        writer = _tar_writer()
        sampler = Mannequins(self.options) if self.layout == "mannequin" else Photos(self.options)

        def work(shard: Shard) -> dict[str, Any]:
            return _write_shard(shard, sampler, writer)

        return work


def _tar_writer() -> Any:
    try:
        from webdataset import TarWriter
    except ImportError as error:
        raise TruePoseError(
            'shards are written with webdataset; install it with: pip install "comfyui-truepose[scale]"'
        ) from error
    return TarWriter


def _write_shard(shard: Shard, sampler: Callable[[Record], Sample], writer: Any) -> dict[str, Any]:
    folder = Path(shard.folder)
    keys, failures = [], []
    path = folder / f"{shard.name}.tar"
    # A fixed time: the same pictures give the same bytes.
    with whole_file(path, overwrite=True) as file, writer(file, encoder=False, mtime=0.0) as tar:
        for record in shard.records:
            try:
                if record.problem is not None:
                    raise TruePoseError(record.problem)
                sample = sampler(record)
            except TruePoseError as error:
                failures.append({"name": record.name, "reason": _reason(error, record)})
                continue
            tar.write({"__key__": sample.key, **sample.parts})
            keys.append(sample.key)
    told = {
        "name": path.name,
        "plan": shard.plan,
        "count": len(keys),
        "bytes": path.stat().st_size,
        "sha256": _file_hash(path),
        "keys": keys,
        "failures": failures,
    }
    atomic_write(folder / f"{shard.name}.json", json.dumps(told), overwrite=True)
    return told


def _reason(error: TruePoseError, record: Record) -> str:
    """The error without the file's own name, so that equal reasons are counted together."""
    text = str(error)
    for path in (record.picture, record.pose, record.parsing):
        if path is not None:
            text = text.replace(str(path), "it")
    return text


class Photos:
    """Record -> `Sample` of a photograph."""

    def __init__(self, options: Options):
        self.options = options
        self._parser = self._estimator = self._encode = None
        if options.parser != KEYPOINTS:
            from truepose_core.parsing.onnx import choose_parser

            self._parser = choose_parser(options.parser, _folders(options))
        if options.estimate_pose:
            from truepose_core.pose.estimation import choose_estimator

            self._estimator = choose_estimator(_folders(options))
        if options.vae is not None:
            self._encode = Latents(options.vae, options.size)

    def __call__(self, record: Record) -> Sample:
        image = load_image(record.picture)
        size = tuple(image.shape[-2:])
        person = self._person(record, image)
        parsing = self._parsing(record, image, person)
        return make_sample(record, _own_bytes(record.picture, image), image, person, parsing, None, self._encode, size)

    def _person(self, record: Record, image: Tensor) -> Person:
        if record.person is not None:
            return record.person
        if record.pose is not None:
            return read_any_pose(record.pose, tuple(image.shape[-2:]))
        if self._estimator is None:
            raise TruePoseError("it has no keypoints; add --estimate-pose")
        from truepose_core.pose.estimation import estimate_pose

        return estimate_pose(image, self._estimator)[0].person(0)

    def _parsing(self, record: Record, image: Tensor, person: Person) -> HumanParsing:
        size = tuple(image.shape[-2:])
        if record.parsing is not None:
            from truepose_core.framing.frame import check_shape

            check_shape("its label map", image_size(record.parsing)[::-1], "the picture", size)
            parsing = HumanParsing.from_label_image(record.parsing, self.options.labels, size=size)
        elif self._parser is not None:
            from truepose_core.parsing.onnx import parse_image

            parsing = parse_image(image, self._parser)
        else:
            from truepose_core.parsing.from_keypoints import parse_from_keypoints

            parsing = parse_from_keypoints(image, body_tensor([person]))
        if parsing.is_empty:
            raise TruePoseError("its parsing shows nobody")
        return parsing


class Mannequins:
    """Record -> `Sample` of the mannequin world, where everything is known exactly."""

    def __init__(self, options: Options):
        if options.size is None:
            raise TruePoseError("mannequins need --size, their pictures' height and width")
        self.options = options
        self._last: tuple[int, Rendering] | None = None
        self._encode = Latents(options.vae, options.size) if options.vae is not None else None

    def __call__(self, record: Record) -> Sample:
        from truepose_core.body.pose import BodyPose

        pose = int(record.key.rpartition("pose")[2])
        height, width = self.options.size
        made = self._person(int(record.group))
        image = made.image[pose : pose + 1]
        body = BodyPose(*(x[pose : pose + 1] for x in (made.theta, made.beta, made.camera)))
        points = Person(made.keypoints[pose].numpy())
        parsing = HumanParsing(made.parsing[pose : pose + 1])
        picture = ("png", _png((image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()))
        return make_sample(record, picture, image, points, parsing, body, self._encode, (height, width))

    def _person(self, number: int) -> Rendering:
        """All poses of one person; the last one is kept, for its poses follow each other."""
        from truepose_core.mannequin import render_people

        if self._last is None or self._last[0] != number:
            o = self.options
            height, width = o.size
            self._last = number, render_people([number], o.poses, o.split, o.seed, height=height, width=width)
        return self._last[1]


class Latents:
    """Picture [1, 3, H, W] -> the mean of its VAE latents, scaled, [4, h, w]; the picture fitted to `size` first."""

    def __init__(self, vae: str, size: tuple[int, int] | None):
        from truepose_core.models.folder import load_vae

        if size is None:
            raise TruePoseError("--vae needs --size, the height and width that pictures are fitted to")
        self.size, self.codec = size, load_vae(vae)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        from truepose_core.framing.frame import fit

        return self.codec.encode(fit(tuple(image.shape[-2:]), self.size).apply(image))[0]


def make_sample(
    record: Record,
    picture: tuple[str, bytes],
    image: Tensor,
    person: Person,
    parsing: HumanParsing,
    body: BodyPose | None,
    encode: Latents | None,
    size: tuple[int, int],
) -> Sample:
    """The parts of a sample. picture: its suffix and bytes. body: lifted from the keypoints where it is None."""
    import numpy as np

    from truepose_core.body.lift import lift_each

    if body is None:
        body = lift_each(body_tensor([person]), size[1] / size[0])
    numbers = torch.cat([x[0].flatten() for x in (body.theta, body.beta, body.camera)]).float().numpy()
    suffix, content = picture
    about = {
        "name": record.name,
        "group": record.group,
        "width": size[1],
        "height": size[0],
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    parts = {
        suffix: content,
        "parsing.png": _png(parsing.labels()[0].to(torch.uint8).numpy()),
        "pose.json": json.dumps(write_pose(pose_of(person, size))[0]).encode(),
        "body.npy": _npy(numbers.astype(np.float32)),
        "json": json.dumps(about).encode(),
    }
    if encode is not None:
        parts["latents.npy"] = _npy(encode(image).half().numpy())
    return Sample(record.key, parts)


def _own_bytes(path: Path, image: Tensor) -> tuple[str, bytes]:
    """The file itself, or, where it is stored lying on its side, the upright picture as PNG."""
    from PIL import Image

    with Image.open(path) as opened:
        upright = opened.size == (image.shape[-1], image.shape[-2]) and opened.getexif().get(0x0112, 1) == 1
    if upright:
        return {"jpeg": "jpg"}.get(path.suffix[1:].lower(), path.suffix[1:].lower()), path.read_bytes()
    return "png", _png((image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def _png(pixels: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _npy(array: Any) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _folders(options: Options) -> list[Path]:
    from truepose_core.networks.known import default_folder

    return [Path(options.models) if options.models else default_folder()]


def summary(manifest: Mapping[str, Any]) -> str:
    """The manifest in words."""
    counts = manifest["counts"]
    pairs = ", ".join(f"{count} {split}" for split, count in counts["pairs"].items())
    lines = [f"{counts['pictures']} pictures in {counts['shards']} shards; pairs: {pairs or 'none'}"]
    for reason, count in manifest["reasons"].items():
        lines.append(f"left out: {count} because {reason}")
    return "\n".join(lines)

"""`truepose eval --pairs-file`: results on listed pairs, measured as a published code measures them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.datasets.keypoints import read_annotations, read_any_pose
from truepose_core.datasets.pairs import Pair, file_stem, in_shop_name
from truepose_core.errors import TruePoseError
from truepose_core.evaluation.faces import open_face_network
from truepose_core.evaluation.perception import (
    ALEXNET,
    INCEPTION,
    features_of,
    file_hash,
    find_weights,
    frechet_distance,
    inception,
    lpips_network,
    moments,
    moments_bytes,
    read_moments,
)
from truepose_core.evaluation.protocols import (
    METRICS,
    PRESETS,
    Protocol,
    best_sample,
    counted,
    lpips_input,
    psnr,
    read_pair,
    read_truth,
    similarities,
)
from truepose_core.parsing import HumanParsing
from truepose_core.pictures.files import load_image
from truepose_core.pose import Person

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_BATCH = 32
NO_PRESET = "truepose"
"""The name under which our own figures (regions, pattern, face) are printed: no published code has them."""


@dataclass(frozen=True)
class Item:
    """One pair on disk. samples: what a model made of it, more than one only where a preset takes the best."""

    source: str
    target: str
    truth: Path
    samples: tuple[Path, ...]

    @property
    def name(self) -> str:
        return f"{file_stem(self.source)}_to_{file_stem(self.target)}"


@dataclass(frozen=True)
class Figure:
    """One number. preset: how it was measured. value: None where no picture counts. error: the standard error of a mean
    over pairs, None for FID. pairs: how many pictures count."""

    preset: str
    name: str
    value: float | None
    error: float | None
    pairs: int


@dataclass(frozen=True)
class PairsReport:
    """The result of `evaluate_pairs`. pairs: of the list. size: (height, width) measured, None for the files' own.
    per_pair: {"pair", column -> number} for each. weights: network -> its file and sha256. real: the reference set.
    statistics: its moments as a file, where the preset has them."""

    preset: str
    figures: list[Figure]
    pairs: int
    size: tuple[int, int] | None
    per_pair: list[dict[str, Any]]
    weights: dict[str, dict[str, Any]]
    real: dict[str, Any]
    versions: dict[str, str]
    statistics: bytes | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; an infinite or missing number is None."""
        return {
            "preset": self.preset,
            "size": f"{self.size[1]}x{self.size[0]}" if self.size else "as they are",
            "pairs": self.pairs,
            "figures": [
                {"preset": f.preset, "name": f.name, "value": _finite(f.value), "error": _finite(f.error), "n": f.pairs}
                for f in self.figures
            ],
            "real": self.real,
            "weights": self.weights,
            "versions": self.versions,
            "per_pair": [
                {k: _finite(v) if isinstance(v, float) else v for k, v in row.items()} for row in self.per_pair
            ],
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def markdown(self) -> str:
        """A table with the preset on each line."""
        lines = ["| figure | preset | value | standard error | pictures |", "| --- | --- | ---: | ---: | ---: |"]
        for f in self.figures:
            value, error = ("-" if x is None else _text(f.name, x) for x in (f.value, f.error))
            lines.append(f"| {f.name} | {f.preset} | {value} | {error} | {f.pairs} |")
        size = f"{self.size[1]}x{self.size[0]} (width x height)" if self.size else "the files' own size"
        told = f"{self.pairs} pairs, preset {self.preset}, at {size}. Of fid and lpips less is better."
        return "\n".join([*lines, "", told]) + "\n"


def evaluate_pairs(
    items: Sequence[Item],
    preset: str,
    *,
    metrics: Iterable[str] = METRICS,
    size: tuple[int, int] | None = None,
    real: Path | None = None,
    inception_file: Path | None = None,
    alexnet_file: Path | None = None,
    parsing: Path | None = None,
    face_network: Path | None = None,
    poses: Path | None = None,
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> PairsReport:
    """Measure results beside the true pictures.

    items: `find_items`. preset: of `PRESETS`. metrics: of `METRICS`. size: (height, width), one of the preset's; None
    takes its first. real: the reference set of FID, a folder of pictures (the training split in the published tables)
    or an .npz of its statistics. inception_file, alexnet_file: weights; None looks in the caches. parsing: a folder of
    label maps STEM.png of the true pictures, for the figures of regions and the pattern score. face_network and poses:
    an ONNX file, and a folder of STEM.json or STEM.txt or a CFLD csv, for face similarity.

    Raises TruePoseError, before anything is measured, for unknown names, missing weights, sizes the preset does not
    have, or files that are missing.
    """
    from tqdm.auto import tqdm

    protocol, chosen = _chosen(preset, metrics)
    size = _size(protocol, size)
    items = sorted(items, key=lambda item: item.name)
    if not protocol.best_of and any(len(item.samples) > 1 for item in items):
        several = next(item for item in items if len(item.samples) > 1)
        raise TruePoseError(
            f"{several.name} has {len(several.samples)} results; the preset {preset} takes one per pair, only pcdms "
            "takes the best of several"
        )
    weights: dict[str, dict[str, Any]] = {}
    fid, real_set = None, {}
    if "fid" in chosen:
        if real is None:
            raise TruePoseError(
                "FID needs --real, the reference pictures (the published tables take the training split) or their "
                "statistics as .npz; or leave it out with --metrics lpips ssim psnr"
            )
        path = find_weights(INCEPTION[protocol.fid_network], inception_file, "FID")
        weights["inception"] = _about(path, INCEPTION[protocol.fid_network].digits)
        fid = inception(protocol.fid_network, path, device)
    lpips = None
    if "lpips" in chosen:
        path = find_weights(ALEXNET, alexnet_file, "LPIPS")
        weights["alexnet"] = _about(path, ALEXNET.digits)
        lpips = lpips_network(path, device)
    regions = _Regions(parsing, items) if parsing is not None else None
    faces = _Faces(face_network, poses, items) if face_network is not None else None
    if faces is not None:
        weights["face network"] = _about(Path(face_network), "")

    rows: list[dict[str, Any]] = []
    made: list[Tensor] = []
    waiting: list[Tensor] = []
    for item in tqdm(items, disable=quiet, unit="pair", desc=f"eval, {preset}"):
        result = item.samples[0] if len(item.samples) == 1 else best_sample(list(item.samples), item.truth)
        pictures = read_pair(protocol, result, item.truth, size)
        row: dict[str, Any] = {"pair": item.name, "result": str(result)}
        if "psnr" in chosen:
            row["psnr"] = psnr(pictures.result, pictures.truth)
        if "ssim" in chosen:
            row |= similarities(protocol, pictures)
        if lpips is not None:
            seen = (pictures.network_result, pictures.network_truth)
            with torch.no_grad():
                row["lpips"] = lpips(*(lpips_input(protocol, x)[None].to(device) for x in seen)).item()
        if fid is not None:
            waiting.append(pictures.network_result)
            if len(waiting) == _BATCH or item is items[-1]:
                made.append(features_of(waiting, fid))
                waiting = []
        if regions is not None:
            row |= regions.measure(item, result)
        if faces is not None:
            row["face_similarity"] = faces.measure(item, result)
        rows.append(row)

    figures, statistics = [], None
    if fid is not None:
        distance, real_set, statistics = _fid(protocol, torch.cat(made), real, fid, size, weights["inception"], quiet)
        figures.append(distance)
    for column in rows[0]:
        if column not in ("pair", "result"):
            figures.append(_mean(protocol, column, [row[column] for row in rows]))
    return PairsReport(
        preset=preset,
        figures=figures,
        pairs=len(items),
        size=size,
        per_pair=rows,
        weights=weights,
        real=real_set,
        versions=_versions(),
        statistics=statistics,
    )


def find_items(pairs: Sequence[Pair], truth: Path, results: Path) -> list[Item]:
    """The files of listed pairs.

    truth: the folder of the true pictures, where a listed target lies under its own name, under its flat In-shop name
    (`in_shop_name`), or under either with another suffix. results: the folder of what a model made: the list's column
    `result`, else SOURCE_to_TARGET.png (or .jpg, .webp; names without folders and suffix, as listed or flat). A pair
    that stands several times with different results has several samples.

    Raises TruePoseError that says how many are missing and names the first few, and for a pair that stands twice.
    """
    for folder, what in ((truth, "true pictures"), (results, "results")):
        if not folder.is_dir():
            raise TruePoseError(f"the folder of {what} {folder} does not exist; check the path")
    found: dict[tuple[str, str], list[Path]] = {}
    truths: dict[str, Path] = {}
    missing: list[str] = []
    for pair in pairs:
        key = (pair.source, pair.target)
        path = truths.get(pair.target) or _one_of(truth, [pair.target, in_shop_name(pair.target)])
        if path is None:
            missing.append(str(truth / pair.target))
            continue
        truths[pair.target] = path
        stems = [f"{a}_to_{b}" for a, b in zip(_stems(pair.source), _stems(pair.target), strict=True)]
        result = _one_of(results, [pair.result] if pair.result else [f"{stem}.png" for stem in stems])
        if result is None:
            missing.append(str(results / (pair.result or f"{stems[0]}.png")))
            continue
        if result in found.get(key, []):
            raise TruePoseError(f"the pair {pair.source} -> {pair.target} stands twice in the list; keep one of them")
        found.setdefault(key, []).append(result)
    if missing:
        raise TruePoseError(
            f"{len(missing)} files of {len(pairs)} pairs do not exist: {', '.join(missing[:3])}"
            + (" ..." if len(missing) > 3 else "")
        )
    return [Item(a, b, truths[b], tuple(samples)) for (a, b), samples in found.items()]


def find_picture(folder: Path, name: str) -> Path:
    """A listed picture in a folder, as `find_items` looks for a target. Raises TruePoseError when it is not there."""
    path = _one_of(folder, [name, in_shop_name(name)])
    if path is None:
        raise TruePoseError(f"{folder / name} does not exist; check the folder and the list")
    return path


def _stems(name: str) -> tuple[str, str]:
    return file_stem(name), file_stem(in_shop_name(name))


def _one_of(folder: Path, names: Sequence[str]) -> Path | None:
    """The first file of these names, then of these names with another suffix."""
    for name in names:
        path = folder / name
        for candidate in (path, *(path.with_suffix(suffix) for suffix in PICTURES)):
            if candidate.is_file():
                return candidate
    return None


def _chosen(preset: str, metrics: Iterable[str]) -> tuple[Protocol, set[str]]:
    if preset not in PRESETS:
        raise TruePoseError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    chosen = set(metrics)
    if not chosen or chosen - set(METRICS):
        raise TruePoseError(f"metrics are {sorted(chosen)}; expected some of {', '.join(METRICS)}")
    return PRESETS[preset], chosen


def _size(protocol: Protocol, size: tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return protocol.sizes[0] if protocol.sizes else None
    if size not in protocol.sizes:
        known = " and ".join(f"{h}x{w}" for h, w in protocol.sizes) or "the files' own size alone"
        raise TruePoseError(
            f"--size {size[0]}x{size[1]}: the preset {protocol.name} measures {known} (height x width); leave it out"
        )
    return size


def _fid(
    protocol: Protocol,
    made: Tensor,
    real: Path,
    network: Any,
    size: tuple[int, int] | None,
    weights: Mapping[str, Any],
    quiet: bool,
) -> tuple[Figure, dict[str, Any], bytes]:
    """FID, what is known of the real set, and its statistics as a file."""
    from tqdm.auto import tqdm

    batch = protocol.fid_batch
    made_as = {
        "preset": protocol.name,
        "size": f"{size[1]}x{size[0]}" if size else "own",
        "inception": str(weights["sha256"]),
    }
    if real.is_file():
        reference, was = read_moments(real)
        for name in was:
            if was[name] != made_as[name]:
                raise TruePoseError(
                    f"the statistics {real} were made with {name} {was[name]}, and now it is {made_as[name]}; make "
                    "them again with --real FOLDER --save-real FILE.npz"
                )
        told = {"statistics": str(real), "checked": bool(was)}
    else:
        files = _real_pictures(real)
        kept = counted(len(files), batch)
        # The codes reuse one object: a reference set smaller than its batch makes it smaller for the results too.
        batch = batch and min(batch, len(files))
        pictures = (read_truth(protocol, path, size) for path in files[:kept])
        features = features_of(tqdm(pictures, total=kept, disable=quiet, unit="image", desc="real set"), network)
        reference = moments(features, protocol)
        told = {"folder": str(real), "pictures": len(files), "counted": kept}
    kept = counted(len(made), batch)
    distance = frechet_distance(reference, moments(made[:kept], protocol))
    figure = Figure(protocol.name, "fid", distance, None, kept)
    return figure, told, moments_bytes(reference, made_as)


def _real_pictures(folder: Path) -> list[Path]:
    """The codes list *.jpg, then *.png; their order within each is the disk's, ours the names'."""
    if not folder.is_dir():
        raise TruePoseError(f"the reference set {folder} does not exist; expected a folder of pictures or an .npz file")
    files = [path for suffix in (".jpg", ".png") for path in sorted(folder.glob(f"*{suffix}"))]
    if len(files) < 2:
        raise TruePoseError(f"the reference set {folder} holds {len(files)} .jpg and .png pictures; expected 2 or more")
    return files


def _mean(protocol: Protocol, column: str, values: list[float]) -> Figure:
    """The mean over pairs that count, in the preset's manner; ours under our own name."""
    ours = column not in ("psnr", "lpips", *(name for name, _ in protocol.ssim))
    if column == "lpips":
        values = values[: counted(len(values), protocol.lpips_batch)]
    numbers = torch.tensor(values, dtype=torch.float64)
    there = numbers[~numbers.isnan()] if ours else numbers
    if not len(there):
        return Figure(NO_PRESET, column, None, None, 0)
    error = (there.std() / len(there) ** 0.5).item() if len(there) > 1 else None
    mean = there.mean().item()
    if column == "pattern":
        mean = min(max(mean, 0.0), 1.0)
    return Figure(NO_PRESET if ours else protocol.name, column, mean, error, len(there))


class _Regions:
    """Figures of regions and the pattern score, on the true picture's own size; a result is brought there (bicubic,
    antialiased)."""

    def __init__(self, folder: Path, items: Sequence[Item]):
        if not folder.is_dir():
            raise TruePoseError(f"the folder of label maps {folder} does not exist; check --parsing")
        self.maps = _beside(folder, items, (".png",), "--parsing")

    def measure(self, item: Item, result: Path) -> dict[str, float]:
        from truepose_core.evaluation.metrics import measure

        truth = load_image(item.truth)
        size = tuple(truth.shape[-2:])
        parsing = HumanParsing.from_label_image(self.maps[item.target], size=size)
        made = at_size(load_image(result), size)
        return {name: float(value[0]) for name, value in measure(made, truth, parsing).items()}


class _Faces:
    def __init__(self, network: Path, poses: Path | None, items: Sequence[Item]):
        if poses is None:
            raise TruePoseError("--face-network needs --poses, the keypoints of the true pictures (a folder, or a csv)")
        self.network = open_face_network(network)
        self.people: dict[str, Person] = {}
        if poses.is_dir():
            files = _beside(poses, items, (".json", ".txt"), "--poses")
            for item in items:
                self.people[item.target] = read_any_pose(files[item.target], load_image(item.truth).shape[-2:])
            return
        annotated = read_annotations(poses)
        for item in items:
            name = next((n for n in (item.target, in_shop_name(item.target)) if n in annotated), None)
            if name is None:
                raise TruePoseError(f"{poses} annotates no {item.target}")
            self.people[item.target] = annotated[name]

    def measure(self, item: Item, result: Path) -> float:
        return self.network.similarity(load_image(result)[0], load_image(item.truth)[0], self.people[item.target])


def _beside(folder: Path, items: Sequence[Item], suffixes: tuple[str, ...], option: str) -> dict[str, Path]:
    """The file STEM.suffix of every true picture."""
    found, missing = {}, []
    for item in items:
        names = [folder / f"{stem}{suffix}" for stem in _stems(item.target) for suffix in suffixes]
        path = next((name for name in names if name.is_file()), None)
        if path is None:
            missing.append(str(names[0]))
        else:
            found[item.target] = path
    if missing:
        raise TruePoseError(f"{option}: {len(missing)} files do not exist: {', '.join(sorted(set(missing))[:3])}")
    return found


def at_size(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, 3, H, W] brought to (height, width), bicubic with antialiasing, in [0, 1]."""
    if tuple(picture.shape[-2:]) == size:
        return picture
    return F.interpolate(picture, size, mode="bicubic", antialias=True).clamp(0, 1)


def _about(path: Path, digits: str) -> dict[str, Any]:
    digest = file_hash(path)
    about: dict[str, Any] = {"file": str(path), "sha256": digest}
    return {**about, "published": digest.startswith(digits)} if digits else about


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    from truepose_core import __version__

    told = {"truepose": __version__}
    for name in ("torch", "torchvision", "torchmetrics", "scikit-image", "opencv-python-headless", "lpips", "pillow"):
        try:
            told[name] = version(name)
        except PackageNotFoundError:
            continue
    return told


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _text(name: str, value: float) -> str:
    return f"{value:.3f}" if name == "fid" or name.endswith("psnr") else f"{value:.4f}"

"""Foreign checkpoints -> one safetensors file of ours, or straight into a model; one tensor at a time."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from truepose_core import __version__
from truepose_core.errors import TruePoseError
from truepose_core.importing import families as systems
from truepose_core.importing.plan import NOT_STATED, Family, Part, Plan, describe
from truepose_core.models.config import TruePoseConfig
from truepose_core.pictures.files import check_output, whole_file
from truepose_core.weights.reading import (
    DTYPES,
    NAMES,
    OTHER_WEIGHTS,
    CheckpointReader,
    TensorInfo,
    refuse_quantised,
    some,
)
from truepose_core.weights.strict import ARCHITECTURE, weights_hash

_SPARE_DISK = 2**24


@dataclass(frozen=True)
class FoundFile:
    """What was found in one file. mapped: how many of its tensors are taken. ignored: reason -> how many.
    skipped: entries of a pickle that are no weights -> why."""

    path: Path
    kind: str
    tensors: int
    parts: tuple[Part, ...]
    mapped: int
    ignored: dict[str, int]
    skipped: dict[str, str]


@dataclass(frozen=True)
class Found:
    """The plan, and per file what was found, mapped and ignored. title: of the family, for people. licence: as the
    family or the files state it."""

    plan: Plan
    title: str
    licence: str
    files: tuple[FoundFile, ...]


class Weights(Mapping[str, Tensor]):
    """Our name -> tensor, read and cast when it is asked for. infos: names, shapes and types without reading."""

    def __init__(self, plan: Plan, readers: Sequence[CheckpointReader], dtype: torch.dtype | None):
        self._plan, self._readers = plan, readers
        self.infos: dict[str, TensorInfo] = {}
        for name, (file, key) in plan.tensors.items():
            info = readers[file].infos()[key]
            cast = dtype is not None and DTYPES[info.dtype].is_floating_point
            self.infos[name] = TensorInfo(info.shape, NAMES[dtype] if cast else info.dtype)

    def __getitem__(self, name: str) -> Tensor:
        """Raises TruePoseError if a finite value does not fit the chosen type."""
        file, key = self._plan.tensors[name]
        x = self._readers[file].tensor(key)
        y = x.to(DTYPES[self.infos[name].dtype])
        if y.dtype != x.dtype and bool((y.isinf() & ~x.isinf()).any()):
            raise TruePoseError(
                f"{self._readers[file].path}: {key} has values up to {x.abs().max().item():.3g}, too large for "
                f"{str(y.dtype).removeprefix('torch.')}; take bfloat16, float32 or the file's own type"
            )
        return y

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.tensors)

    def __len__(self) -> int:
        return len(self._plan.tensors)


def find(files: Sequence[str | Path], choices: Mapping[str, str] | None = None, *, whole: bool = True) -> Found:
    """What these files are together and how they become one of ours. Reads no values, writes nothing.

    choices: what the user says where files alone do not tell: "family", "weights" (which set of a file that holds
    several), and the families' own. whole: compare names and shapes with the network that diffusers builds; who loads
    the weights strictly, or has no diffusers, leaves it out. Raises TruePoseError when a file cannot be read or is not
    recognised, when files belong to different systems, one is missing, shapes are wrong, or a choice is needed or
    unknown.
    """
    with opened(files, choices, whole=whole) as (found, _):
        return found


@contextmanager
def opened(
    files: Sequence[str | Path],
    choices: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    whole: bool = True,
) -> Iterator[tuple[Found, Weights]]:
    """`find`, and the weights under our names, memory-mapped while the context lasts. dtype: cast them to it."""
    choices = _Choices(choices or {})
    with ExitStack() as stack:
        readers = _open(files, choices, stack)
        found = _find(readers, choices, whole)
        yield found, Weights(found.plan, readers, dtype)


def convert(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    choices: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    whole: bool = True,
) -> Found:
    """Write one safetensors file with the weights of `files`, whole or not at all, one tensor at a time.

    dtype: float32, float16 or bfloat16 for all weights; None keeps the files' own. progress: called with bytes done and
    in all; the sources are read for their sha256 first, then the weights twice, for their hash and to write them.
    whole: as in `find`. Returns what was found. Raises TruePoseError as `find`, when the output exists or is one of the
    files, the disk is too small, or a value does not fit the dtype.
    """
    out = check_output(out, overwrite, (".safetensors",))
    choices = _Choices(choices or {})
    with ExitStack() as stack:
        readers = _open(files, choices, stack)
        sources = [path for reader in readers for path in reader.files]
        if out.exists() and any(out.samefile(path) for path in sources):
            raise TruePoseError(f"output {out} is one of the files to convert; choose another path")
        found = _find(readers, choices, whole)
        weights = Weights(found.plan, readers, dtype)
        size = sum(_size(info) for info in weights.infos.values())
        _check_disk(out, size)
        step = _steps(progress, sum(path.stat().st_size for path in sources) + 2 * size)
        config = found.plan.config
        hashes = [{"file": n, "sha256": h} for reader in readers for n, h in reader.sha256(step).items()]
        metadata = {
            "format": "pt",
            "architecture": ARCHITECTURE,
            **{key: _text(config[key]) for key in ("prediction_type", "scheduler") if key in config},
            **found.plan.metadata,
            "licence": found.licence,
            "config": _text(config),
            "family": found.plan.family,
            "sources": _text(hashes),
            "converter": f"truepose {__version__}",
            "sha256": weights_hash(_Watched(weights, step)),
        }
        _write(out, _Watched(weights, step), weights.infos, metadata)
    return found


class _Choices(Mapping[str, str]):
    """The user's choices, which remember who asked for them."""

    def __init__(self, values: Mapping[str, str]):
        self._values, self.asked = dict(values), set()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _Watched(Mapping[str, Tensor]):
    """Weights that tell how many bytes were read."""

    def __init__(self, weights: Weights, step: Callable[[int], None]):
        self._weights, self._step = weights, step

    def __getitem__(self, name: str) -> Tensor:
        x = self._weights[name]
        self._step(x.nbytes)
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _licence(readers: Sequence[CheckpointReader]) -> str:
    """What the files' own metadata say of their licence."""
    said = [reader.metadata.get(key) for reader in readers for key in ("licence", "license", "modelspec.license")]
    return ", ".join(dict.fromkeys(filter(None, said))) or NOT_STATED


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _steps(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return step


def _open(files: Sequence[str | Path], choices: _Choices, stack: ExitStack) -> list[CheckpointReader]:
    if not files:
        raise TruePoseError("no files were given; name the weight files to convert")
    readers: list[CheckpointReader] = []
    for path in map(Path, files):
        if any(path.exists() and path.samefile(reader.path) for reader in readers):
            raise TruePoseError(f"{path} is given twice; name each file once")
        readers.append(stack.enter_context(CheckpointReader(path, choices.get("weights"))))
    if "weights" in choices and not any(OTHER_WEIGHTS in reader.skipped.values() for reader in readers):
        raise TruePoseError("the choice 'weights' means nothing here: no file holds several sets of them; leave it out")
    for reader in readers:
        refuse_quantised(reader.infos(), str(reader.path))
    return readers


def _find(readers: Sequence[CheckpointReader], choices: _Choices, whole: bool) -> Found:
    files = [reader.infos() for reader in readers]
    family, parts, plan = _choose(readers, files, choices)
    unread = sorted(set(choices) - choices.asked)
    if unread:
        raise TruePoseError(f"the choice {unread[0]!r} means nothing for these files ({family.title}); leave it out")
    _check_keys(plan, readers, files)
    if whole:
        _check_model(plan, files, family.title)
    rows = []
    for i, (reader, tensors) in enumerate(zip(readers, files, strict=True)):
        mapped = len({key for file, key in plan.tensors.values() if file == i})
        ignored = Counter(reason for (file, _), reason in plan.ignored.items() if file == i)
        own = tuple(part for part in parts if part.file == i)
        rows.append(FoundFile(reader.path, reader.kind, len(tensors), own, mapped, dict(ignored), reader.skipped))
    licence = plan.metadata.get("licence") or _licence(readers)
    return Found(plan, plan.metadata.get("title", family.title), licence, tuple(rows))


def _choose(
    readers: Sequence[CheckpointReader], files: Sequence[Mapping[str, TensorInfo]], choices: _Choices
) -> tuple[Family, list[Part], Plan]:
    """The one family that explains all files."""
    families = {family.name: family for family in systems.FAMILIES}
    wanted = choices.get("family")
    if wanted is not None and wanted not in families:
        raise TruePoseError(f"the family {wanted!r} is unknown; expected one of {', '.join(families)}")
    parts = {
        name: [part for i, tensors in enumerate(files) for part in family.recognise(i, tensors)]
        for name, family in families.items()
        if wanted in (None, name)
    }
    knowing = [[name for name in parts if any(p.file == i for p in parts[name])] for i in range(len(files))]
    for reader, names, tensors in zip(readers, knowing, files, strict=True):
        if reader.metadata.get("architecture") == ARCHITECTURE:
            raise TruePoseError(f"{reader.path} is a model of this package already; use it as it is")
        if not names:
            titles = ", ".join(families[name].title for name in parts)
            raise TruePoseError(f"{reader.path} {not_recognised(tensors)}; expected weights of: {titles}")
    common = [name for name in parts if all(name in names for names in knowing)]
    if not common:
        told = "; ".join(
            f"{reader.path.name} is of {' or '.join(families[n].title for n in names)}"
            for reader, names in zip(readers, knowing, strict=True)
        )
        raise TruePoseError(f"the files belong to different systems ({told}); convert one system at a time")
    plans: dict[str, Plan] = {}
    errors: list[str] = []
    for name in common:
        try:
            plans[name] = families[name].plan(parts[name], files, choices)
        except TruePoseError as error:
            told = re.sub(r"\bfile (\d+)\b", lambda m: readers[int(m[1])].path.name, str(error))
            errors.append(f"as {families[name].title}: {told}")
    if not plans:
        raise TruePoseError("; ".join(errors))
    if len(plans) > 1:
        titles = " or ".join(families[name].title for name in plans)
        options = " or ".join(f"--choose family={name}" for name in plans)
        raise TruePoseError(f"these files can be read as {titles}; say which with {options}")
    name, plan = plans.popitem()
    return families[name], parts[name], plan


def not_recognised(tensors: Mapping[str, TensorInfo]) -> str:
    """Why no family knows these tensors, as the end of a sentence about the file."""
    kind = describe(tensors)
    if kind is not None:
        return f"looks like {kind.name}, which is not a model of a system that can be converted"
    return f"is not recognised (keys such as {some(list(tensors))})"


def _check_keys(plan: Plan, readers: Sequence[CheckpointReader], files: Sequence[Mapping[str, TensorInfo]]) -> None:
    """Every key is mapped or ignored with a reason, and nothing is mapped that is not there."""
    used = set(plan.tensors.values())
    for i, (reader, tensors) in enumerate(zip(readers, files, strict=True)):
        lost = [key for file, key in used if file == i and key not in tensors]
        if lost:
            raise TruePoseError(f"{reader.path} lacks {len(lost)} tensors: {some(sorted(lost))}; get the file again")
        rest = [key for key in tensors if (i, key) not in used and (i, key) not in plan.ignored]
        if rest:
            raise TruePoseError(
                f"{reader.path} has {len(rest)} tensors that nobody knows: {some(rest)}; it is a variant that "
                "cannot be converted"
            )


def _check_model(plan: Plan, files: Sequence[Mapping[str, TensorInfo]], title: str) -> None:
    """The planned tensors are exactly the weights of the model that the configuration describes."""
    expected = expected_shapes(plan.config) if plan.expected is None else plan.expected
    missing = [name for name in expected if name not in plan.tensors]
    unknown = [name for name in plan.tensors if name not in expected]
    shapes = [
        f"{key} is {files[file][key].shape}, expected {expected[name]}"
        for name, (file, key) in plan.tensors.items()
        if name in expected and files[file][key].shape != expected[name]
    ]
    problems = [
        f"{len(items)} {label}: {some(items)}"
        for label, items in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if items
    ]
    if problems:
        raise TruePoseError(f"the weights do not make up a whole model of {title}. {'; '.join(problems)}")


def expected_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight in the file of the model that this configuration (JSON values) describes: its VAE
    only where it brings one. Allocates nothing. Raises TruePoseError where diffusers is not installed."""
    from truepose_core.models.model import TruePoseModel

    if find_spec("diffusers") is None:
        raise TruePoseError("checking the weights needs diffusers; install it with: pip install diffusers")
    settings = TruePoseConfig.from_json(json.dumps(config))
    with torch.device("meta"):
        model = TruePoseModel(settings, codec=torch.nn.Identity() if settings.vae is None else None)
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


def _size(info: TensorInfo) -> int:
    return torch.Size(info.shape).numel() * DTYPES[info.dtype].itemsize


def _check_disk(out: Path, size: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < size + _SPARE_DISK:
        raise TruePoseError(
            f"{out} needs {size / 2**30:.1f} GiB and {out.parent} has {free / 2**30:.1f} GiB free; free some, choose "
            "another folder, or take --dtype float16"
        )


def _write(out: Path, weights: Mapping[str, Tensor], infos: Mapping[str, TensorInfo], metadata: dict[str, str]) -> None:
    """A safetensors file (its format's documentation): length of the header, header, and the tensors' bytes. Wider
    types come first, so that every tensor is aligned."""
    order = sorted(infos, key=lambda name: -DTYPES[infos[name].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for name in order:
        end = at + _size(infos[name])
        header[name] = {"dtype": infos[name].dtype, "shape": list(infos[name].shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(out, overwrite=True) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(weights[name].flatten().view(torch.uint8).numpy())

"""Reading checkpoints of any making: safetensors, torch pickles, shards; one tensor at a time, never running code.

What a training script wrapped around the weights is taken off: `{"state_dict": ...}`, `{"ema": ...}`, DDP's `module.`,
torch.compile's `_orig_mod.`. Nested dicts of tensors become dotted names.
"""

from __future__ import annotations

import hashlib
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.json_text import read_json


@dataclass(frozen=True)
class TensorInfo:
    """shape: of the tensor. dtype: safetensors' name of its type, such as "F32", "F16" or "BF16"."""

    shape: tuple[int, ...]
    dtype: str


def some(names: Sequence[str], count: int = 3) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:count]) + (" ..." if len(names) > count else "")


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "BOOL": torch.bool,
}
"""safetensors' name -> torch type, of what can be converted."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "module", "model", "weights", "net", "params"),
    *("ema", "ema_state_dict", "model_ema", "params_ema"),
)
"""What training scripts call the dict that holds the weights."""
TRAINING = (
    *("optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "optim"),
    *("lr_scheduler", "lr_schedulers", "scheduler", "scheduler_state_dict", "scaler", "grad_scaler", "amp"),
    *("callbacks", "loops", "rng_state", "rng_states", "random_states"),
)
"""What they call the rest."""
OTHER_WEIGHTS = "another set of weights was chosen"
"""Why a set of weights is not read."""
PARALLEL = ("module.", "_orig_mod.")

QUANTISED = re.compile(
    r"\.(absmax|quant_map|nested_absmax|quant_state(\..+)?|SCB|weight_format|qweight|qzeros|scale_weight|comfy_quant)$"
    r"|(^|\.)scaled_fp8$"
)
"""Names that quantising tools put beside a weight (bitsandbytes, GPTQ and AWQ, scaled fp8)."""

_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)$")
_CHUNK = 2**22
_DEFLATED = 2**28
"""Bytes that a compressed file may hold whatever its size; beyond, they may be `_RATIO` times the file's."""
_RATIO = 20


@dataclass(frozen=True)
class _Content:
    """What a file holds. get: name -> tensor. files: the file, and its shards. skipped: entry -> why it is not read."""

    kind: str
    infos: dict[str, TensorInfo]
    get: Callable[[str], Tensor]
    files: tuple[Path, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


class CheckpointReader(AbstractContextManager["CheckpointReader"]):
    """A checkpoint on disk: a .safetensors file, a torch pickle, or the .index.json of a sharded one.

    kind: in words. metadata: of a safetensors file. skipped: entry -> why it is not read (optimiser states, numbers).
    weights: which of several sets of weights in one file to read ("state_dict", "ema", ...).

    Files are memory-mapped where their format allows it: all but pickles from before torch 1.6 and compressed ones,
    which are read whole. Raises TruePoseError for a file that is missing, truncated, no checkpoint, without tensors, or
    a pickle that would run code, which is named and not run.
    """

    def __init__(self, path: str | Path, weights: str | None = None):
        self.path = Path(path)
        self._stack = ExitStack()
        _refuse_lone_shard(self.path)
        with self._stack:
            self._content = _open(self.path, weights, self._stack)
            if not self._content.infos:
                raise TruePoseError(f"{self.path} holds no tensors; expected the weights of a network")
            self._stack = self._stack.pop_all()
        self.kind, self.metadata, self.skipped = self._content.kind, self._content.metadata, self._content.skipped
        self._hashes: dict[str, str] = {}

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that are read: one, or an index and its shards."""
        return self._content.files

    def infos(self) -> dict[str, TensorInfo]:
        """Name -> shape and type of every tensor, in the file's order. Reads no values."""
        return self._content.infos

    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU, contiguous, in the file's type; names that share a storage get equal tensors."""
        return self._content.get(name).detach().contiguous()

    def sha256(self, progress: Callable[[int], None] | None = None) -> dict[str, str]:
        """File name -> sha256 of its bytes, for every file that is read. progress: called with bytes read."""
        for path in self.files:
            if path.name not in self._hashes:
                self._hashes[path.name] = _sha256(path, progress)
        return dict(self._hashes)


def _sha256(path: Path, progress: Callable[[int], None] | None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def refuse_quantised(infos: Mapping[str, TensorInfo], where: str) -> None:
    """Raise TruePoseError, naming the first few, if tensors are fp8 or quantised."""
    found = [f"{name} ({info.dtype})" for name, info in infos.items() if info.dtype not in DTYPES]
    found += [name for name in infos if QUANTISED.search(name) and infos[name].dtype in DTYPES]
    if found:
        raise TruePoseError(
            f"{where} holds fp8, quantised or sparse tensors, {len(found)} of them: {some(found)}; get the float32, "
            "float16 or bfloat16 file of the same model"
        )


def _refuse_lone_shard(path: Path) -> None:
    shard = _SHARD.match(path.name)
    if shard:
        index = path.with_name(f"{shard[1]}{shard[2]}.index.json")
        if index.is_file():
            raise TruePoseError(f"{path} is one shard of several; give {index}, which lists them all")


def _open(path: Path, weights: str | None, stack: ExitStack) -> _Content:
    try:
        if path.is_dir():
            raise TruePoseError(f"{path} is a folder; name the weight files in it")
        if not path.is_file():
            raise TruePoseError(f"no file at {path}; expected a checkpoint (.safetensors, .pth, .pt, .bin, .ckpt)")
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise TruePoseError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".json":
        return _open_sharded(path, weights, stack)
    # First: the length of its header, which comes before the brace, may look like the start of the others.
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return _open_safetensors(path, stack)
    if start[:2] == b"PK":
        return _open_zip(path, weights)
    if start[:1] == b"\x80":
        return _read_pickle(path, weights, mapped=False, kind="torch pickle from before torch 1.6")
    if start[:4] == b"GGUF":
        raise TruePoseError(
            f"{path} is a GGUF file, which is quantised; get the float32, float16 or bfloat16 file of the same model"
        )
    size = path.stat().st_size
    what = "is empty (0 bytes)" if not size else f"is no checkpoint (it starts with {start!r})"
    raise TruePoseError(f"{path} {what}; expected a .safetensors file or what torch.save writes. Get or copy it again")


def _open_safetensors(path: Path, stack: ExitStack) -> _Content:
    from safetensors import SafetensorError, safe_open

    try:
        file = stack.enter_context(safe_open(str(path), framework="pt"))
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        infos = {name: TensorInfo(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise TruePoseError(
            f"{path} is not a complete safetensors file ({error}); it may be truncated: get or copy it again"
        ) from error
    prefix = _parallel_prefix(list(infos))
    infos = {name.removeprefix(prefix): info for name, info in infos.items()}
    return _Content(
        "safetensors", infos, lambda name: file.get_tensor(prefix + name), (path,), dict(file.metadata() or {})
    )


def _open_zip(path: Path, weights: str | None) -> _Content:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    # A damaged directory of entries: names in no encoding, versions that never were, numbers cut off.
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise TruePoseError(
            f"{path} is not a complete file ({error}): a zip archive whose end is missing, so it is truncated, or "
            "damaged; get or copy it again"
        ) from error
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise TruePoseError(f"{path} is a TorchScript program, not weights alone; expected what torch.save writes")
    if "data.pkl" not in names:
        raise TruePoseError(f"{path} is a zip archive without a checkpoint; unpack it and name the weight files in it")
    compressed = any(entry.compress_type for entry in entries)
    size = sum(entry.file_size for entry in entries)
    if compressed and size > max(_DEFLATED, _RATIO * path.stat().st_size):
        raise TruePoseError(
            f"{path} is compressed and would take {size / 2**30:.1f} GiB of memory, far more than weights shrink by; "
            "get it uncompressed, as torch.save writes it"
        )
    return _read_pickle(path, weights, mapped=not compressed, kind="torch pickle")


def _read_pickle(path: Path, weights: str | None, mapped: bool, kind: str) -> _Content:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raw = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        callables = re.findall(r"(?:GLOBAL|class) ([A-Za-z_][\w.]*\.\w+)", str(error)) or _callables(path)
        if callables:
            raise TruePoseError(
                f"{path} is a pickle that calls {callables[0]} when opened; it was refused and nothing of it ran. "
                "Get the model as .safetensors, or as a file with tensors only"
            ) from error
        raise TruePoseError(
            f"{path} is a damaged pickle, or one that torch.save did not write; get or copy it again"
        ) from error
    # A damaged file may raise anything in torch: assertions, struct errors, a tensor too large to be true.
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise TruePoseError(
            f"{path} is not a complete checkpoint ({why}); it may be truncated: get or copy it again"
        ) from error
    if not isinstance(raw, Mapping):
        raise TruePoseError(f"{path} holds a {type(raw).__name__}; expected a dict of tensors")
    skipped: dict[str, str] = {}
    inner, where = _unwrap(raw, weights, path, skipped)
    tensors = _flatten(inner, where, skipped)
    for name, x in tensors.items():
        if x.layout == torch.strided and (x.device.type != "cpu" or x.nbytes > x.untyped_storage().nbytes()):
            raise TruePoseError(
                f"{path} says that {name} is {tuple(x.shape)}, and does not hold as many numbers; get or copy it again"
            )
    infos = {name: TensorInfo(tuple(x.shape), _dtype_name(x)) for name, x in tensors.items()}
    return _Content(kind, infos, tensors.__getitem__, (path,), skipped=skipped)


def _callables(path: Path) -> list[str]:
    """What a plain pickle calls, by its first MiB; torch names it only in pickles of its own protocol."""
    with open(path, "rb") as file:
        start = file.read(2**20)
    found, texts = [], []
    try:
        for code, value, _ in pickletools.genops(start):
            if code.name == "STACK_GLOBAL":
                found.append(".".join(texts[-2:]))
            elif code.name in ("GLOBAL", "INST"):
                found.append(str(value).replace(" ", "."))
            elif isinstance(value, str):
                texts.append(value)
    except ValueError:  # the end of what was read
        pass
    return found


def _dtype_name(x: Tensor) -> str:
    """safetensors' name of a type, or torch's own name of one it does not know or that is not laid out plainly."""
    if x.layout != torch.strided:
        return str(x.layout).removeprefix("torch.")
    return NAMES.get(x.dtype, str(x.dtype).removeprefix("torch."))


def _unwrap(
    raw: Mapping[Any, Any], weights: str | None, path: Path, skipped: dict[str, str], where: str = ""
) -> tuple[Mapping[Any, Any], str]:
    """The dict that holds the weights, and its place. What stands beside it goes to `skipped`."""
    if any(isinstance(value, Tensor) for value in raw.values()):
        return raw, where
    holders = [name for name, value in raw.items() if name not in TRAINING and _holds_tensors(value)]
    found = [name for name in WRAPPERS if name in holders]
    if not found or len(found) < len(holders):
        return raw, where
    if len(found) > 1 and weights is None:
        raise TruePoseError(
            f"{path} holds several sets of weights: {', '.join(found)}; say which with --choose weights={found[0]}"
        )
    if weights is not None and len(found) > 1 and weights not in found:
        raise TruePoseError(f"{path} has no weights {weights!r}; it has {', '.join(found)}")
    chosen = weights if len(found) > 1 else found[0]
    for name, value in raw.items():
        if name != chosen:
            skipped[f"{where}{name}"] = OTHER_WEIGHTS if name in found else _no_weights(name, value)
    return _unwrap(raw[chosen], weights, path, skipped, f"{where}{chosen}.")


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(v) for v in value.values())
    return isinstance(value, Tensor)


def _no_weights(name: Any, value: Any) -> str:
    return "training state" if name in TRAINING else f"no weights ({type(value).__name__})"


def _flatten(raw: Mapping[Any, Any], where: str, skipped: dict[str, str]) -> dict[str, Tensor]:
    """Nested dicts -> dotted names."""
    tensors: dict[str, Tensor] = {}
    prefix = _parallel_prefix([str(name) for name in raw])
    for key, value in raw.items():
        name = str(key).removeprefix(prefix)
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping) and name not in TRAINING and _holds_tensors(value):
            inner = _flatten(value, f"{where}{name}.", skipped)
            tensors.update({f"{name}.{k}": x for k, x in inner.items()})
        else:
            skipped[f"{where}{name}"] = _no_weights(name, value)
    return tensors


def _parallel_prefix(names: list[str]) -> str:
    """The prefixes of DDP and torch.compile that all names carry."""
    prefix = ""
    while names:
        more = next((p for p in PARALLEL if all(name.startswith(prefix + p) for name in names)), None)
        if more is None:
            break
        prefix += more
    return prefix


def _open_sharded(path: Path, weights: str | None, stack: ExitStack) -> _Content:
    try:
        index = read_json(path, str(path))
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not (isinstance(weight_map, dict) and weight_map and all(isinstance(x, str) for x in weight_map.values())):
            raise TruePoseError(f"{path} has no weight_map from tensors to file names")
    except TruePoseError as error:
        raise TruePoseError(
            f"{path} is no index of a sharded checkpoint ({error}); expected JSON with a weight_map, or the weights "
            "themselves"
        ) from error
    shards = sorted(set(weight_map.values()))
    outside = [name for name in shards if name in ("", "..") or Path(name).name != name or name.endswith(".json")]
    if outside:
        raise TruePoseError(f"{path} names the shard {outside[0]!r}; expected names of weight files in the same folder")
    contents = {name: _open(path.with_name(name), weights, stack) for name in shards}
    owner: dict[str, str] = {}
    for name, content in contents.items():
        for key in content.infos:
            if key in owner:
                raise TruePoseError(f"{path}: {key} is in two shards, {owner[key]} and {name}; get them again")
            owner[key] = name
    prefix = _parallel_prefix(list(weight_map))
    lost = [key for key in weight_map if key.removeprefix(prefix) not in owner]
    if lost:
        raise TruePoseError(
            f"{path}: {len(lost)} tensors are not in their shards: {some(lost)}; get the shards again, all of one "
            "version"
        )
    return _Content(
        f"{len(shards)} shards",
        {key: contents[name].infos[key] for key, name in owner.items()},
        lambda key: contents[owner[key]].get(key),
        (path, *(path.with_name(name) for name in shards)),
        skipped={f"{name}: {k}": v for name, content in contents.items() for k, v in content.skipped.items()},
    )

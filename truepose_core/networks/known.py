"""Public models that the pack can use: where each is published, where it is on disk, and fetching one when asked."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from truepose_core.errors import TruePoseError

Progress = Callable[[int, "int | None"], None]
"""Called with (bytes there so far, bytes in all or None where the server does not say)."""

_CHUNK = 1 << 20
_TIMEOUT = 30.0
MODELS_VARIABLE = "TRUEPOSE_MODELS"


@dataclass(frozen=True)
class KnownModel:
    """A model that somebody published.

    files: names it goes by on disk; the first is the one we save it under. page: where a person reads about it. url:
    the file itself, None where no ONNX file is published. size in bytes and sha256: as published, else None.
    licence: as its page states it. how: what to do where there is no url.
    """

    name: str
    files: tuple[str, ...]
    purpose: str
    page: str
    licence: str
    url: str | None = None
    size: int | None = None
    sha256: str | None = None
    how: str = ""

    @property
    def file(self) -> str:
        return self.files[0]


_IDM_VTON = "https://huggingface.co/yisol/IDM-VTON"
_DWPOSE = "https://huggingface.co/yzd-v/DWPose"
_B2 = "https://huggingface.co/mattmdjaga/segformer_b2_clothes"
_B3 = "https://huggingface.co/sayeed99/segformer_b3_clothes"

KNOWN: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="schp-atr",
            files=("parsing_atr.onnx", "schp-atr.onnx", "schp_atr.onnx"),
            purpose="human parsing, 18 labels of ATR (clothes)",
            page=f"{_IDM_VTON}/tree/main/humanparsing",
            licence="CC BY-NC-SA 4.0 (of the repository that publishes this export); SCHP's code is MIT",
            url=f"{_IDM_VTON}/resolve/main/humanparsing/parsing_atr.onnx",
            size=266_859_305,
            sha256="04c7d1d070d0e0ae943d86b18cb5aaaea9e278d97462e9cfb270cbbe4cd977f4",
        ),
        KnownModel(
            name="schp-lip",
            files=("parsing_lip.onnx", "schp-lip.onnx", "schp_lip.onnx"),
            purpose="human parsing, 20 labels of LIP (tells face from neck)",
            page=f"{_IDM_VTON}/tree/main/humanparsing",
            licence="CC BY-NC-SA 4.0 (of the repository that publishes this export); SCHP's code is MIT",
            url=f"{_IDM_VTON}/resolve/main/humanparsing/parsing_lip.onnx",
            size=266_863_411,
            sha256="8436e1dae96e2601c373d1ace29c8f0978b16357d9038c17a8ba756cca376dbc",
        ),
        KnownModel(
            name="segformer-b2-clothes",
            files=("segformer_b2_clothes.onnx", "segformer-b2-clothes.onnx"),
            purpose="human parsing, 18 labels of ATR (clothes), the smallest file",
            page=f"{_B2}/tree/main/onnx",
            licence="MIT (its page); the SegFormer weights it was trained from have a licence of NVIDIA's own",
            url=f"{_B2}/resolve/main/onnx/model.onnx",
            size=110_039_290,
            sha256="a93a8dac171b5c1fcc53632a8bfc180bfd9759ea69a3e207451bb07f76add54f",
        ),
        KnownModel(
            name="segformer-b3-clothes",
            files=("segformer_b3_clothes.onnx", "segformer-b3-clothes.onnx"),
            purpose="human parsing, 18 labels of ATR (clothes)",
            page=_B3,
            licence="MIT (its page); the SegFormer weights it was trained from have a licence of NVIDIA's own",
            how=(
                "only PyTorch weights are published: make the file with "
                "`optimum-cli export onnx --model sayeed99/segformer_b3_clothes FOLDER` and rename its model.onnx"
            ),
        ),
        KnownModel(
            name="dwpose",
            files=("dw-ll_ucoco_384.onnx",),
            purpose="pose of a person in a photo: body, hands, face",
            page=f"{_DWPOSE}/tree/main",
            licence="Apache-2.0",
            url=f"{_DWPOSE}/resolve/main/dw-ll_ucoco_384.onnx",
            size=134_399_116,
            sha256="724f4ff2439ed61afb86fb8a1951ec39c6220682803b4a8bd4f598cd913b1843",
        ),
        KnownModel(
            name="yolox-l",
            files=("yolox_l.onnx",),
            purpose="finds the people in a photo for dwpose",
            page=f"{_DWPOSE}/tree/main",
            licence="Apache-2.0",
            url=f"{_DWPOSE}/resolve/main/yolox_l.onnx",
            size=216_746_733,
            sha256="7860ae79de6c89a3c1eb72ae9a2756c0ccfbe04b7791bb5880afabd97855a411",
        ),
    )
}


def default_folder() -> Path:
    """Where models are outside ComfyUI: $TRUEPOSE_MODELS, else truepose/models in the user's cache folder."""
    named = os.environ.get(MODELS_VARIABLE)
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(cache) if cache else Path.home() / ".cache") / "truepose" / "models"


def known_model(name: str) -> KnownModel:
    """The model of that name. Raises `TruePoseError` for an unknown one; the message lists the known names."""
    if name not in KNOWN:
        raise TruePoseError(f"unknown model {name!r}; the known models are {', '.join(KNOWN)}")
    return KNOWN[name]


def find(name: str, folders: Iterable[Path | str]) -> Path | None:
    """The file of a known model in the first of these folders that has it (at any depth), else None."""
    model = known_model(name)
    for folder in map(Path, folders):
        for file in model.files:
            if (folder / file).is_file():
                return folder / file
        inside = (path for file in model.files for path in sorted(folder.rglob(file)))
        found = next((path for path in inside if path.is_file()), None)
        if found is not None:
            return found
    return None


def locate(name: str, folders: Iterable[Path | str]) -> Path:
    """As `find`. Raises `TruePoseError` that says which file to put where when no folder has it."""
    folders = [Path(folder) for folder in folders]
    found = find(name, folders)
    if found is None:
        model = known_model(name)
        fetch = f", or run `truepose models get {name}`" if model.url else ""
        where = folders[0] if folders else default_folder()
        raise TruePoseError(
            f"the model {name} is not in {' or '.join(map(str, folders))}. {by_hand(model, where)}{fetch}"
        )
    return found


def by_hand(model: KnownModel, folder: Path | str) -> str:
    """How a person gets the file: one sentence."""
    if model.url is None:
        return f"Of {model.name} {model.how}; put it at {Path(folder) / model.file} ({model.page})"
    file = model.url.rpartition("/")[2]
    return f"Open {model.page}, download {file} and put it at {Path(folder) / model.file}"


def get(name: str, folder: Path | str, *, progress: Progress | None = None) -> Path:
    """Download a known model into the folder, or return the file that is there. As `download`."""
    return download(known_model(name), folder, progress=progress)


def download(model: KnownModel, folder: Path | str, *, progress: Progress | None = None) -> Path:
    """Download a model's file into the folder, resuming one that was cut, and return its path.

    Until it is whole and, where a hash is published, right, the file is called NAME.part. Raises `TruePoseError` when
    no file is published, the server or the disk refuses, the connection breaks (what came is kept and the next call
    goes on from there), or the hash is wrong (the file is deleted).
    """
    folder = Path(folder)
    path = folder / model.file
    if path.is_file():
        return path
    if model.url is None:
        raise TruePoseError(f"{model.name} cannot be downloaded. {by_hand(model, folder)}")
    part = folder / f"{model.file}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(model, folder, part)
        _fetch(model, part, progress)
        _check_hash(model, part)
        os.replace(part, path)
    except urllib.error.HTTPError as error:
        raise TruePoseError(
            f"{model.url} answers {error.code} {error.reason}; the file may have moved. {by_hand(model, folder)}"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise TruePoseError(
            f"the download of {model.name} broke off or could not start ({reason}); {_kept(part)}. "
            f"Without network: {by_hand(model, folder)}"
        ) from error
    except OSError as error:
        raise TruePoseError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _kept(part: Path) -> str:
    size = part.stat().st_size if part.exists() else 0
    return f"{size:,} bytes are kept, start it again to go on" if size else "start it again"


def _check_space(model: KnownModel, folder: Path, part: Path) -> None:
    if model.size is None:
        return
    there = part.stat().st_size if part.exists() else 0
    free = shutil.disk_usage(folder).free
    if free < model.size - there:
        raise TruePoseError(
            f"{model.name} needs {(model.size - there) >> 20} MiB and {folder} has {free >> 20} MiB free; make room, "
            "or choose another folder"
        )


def _fetch(model: KnownModel, part: Path, progress: Progress | None) -> None:
    """Make `part` whole."""
    there = part.stat().st_size if part.exists() else 0
    if model.size is not None and there >= model.size:
        there = 0 if there > model.size else there
        if there:
            return
    request = urllib.request.Request(model.url, headers={"User-Agent": "truepose"})
    if there:
        request.add_header("Range", f"bytes={there}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # What is there is longer than the file, or the whole of it: only a fresh start tells.
        part.unlink()
        return _fetch(model, part, progress)
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {there}-"):
            raise TruePoseError(f"{model.url} answers with another part of the file than asked; delete {part}")
        done = there if resumed else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length and length.isdigit() else model.size
        if model.size is not None and total != model.size:
            raise TruePoseError(
                f"{model.url} is {total:,} bytes and {model.name} is published with {model.size:,}; the file was "
                f"changed, or the answer is a web page. {by_hand(model, part.parent)}"
            )
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise ConnectionError(f"{done:,} of {total:,} bytes came")


def _check_hash(model: KnownModel, part: Path) -> None:
    if model.sha256 is None:
        return
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != model.sha256:
        part.unlink()
        raise TruePoseError(
            f"what {model.url} gave is not the published {model.name}: its sha256 is {digest.hexdigest()}, expected "
            f"{model.sha256}. It was deleted; try again, and if that gives the same, {by_hand(model, part.parent)}"
        )

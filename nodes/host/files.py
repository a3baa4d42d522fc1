"""The host's models folder, its progress bar and its Stop button, for nodes that read and fetch files."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths

from truepose_core.networks.known import Progress

FOLDER = "truepose"
PHOTOS = Path(__file__).resolve().parents[2] / "workflows" / "input"
log = logging.getLogger("truepose")
SUFFIXES = (".safetensors", ".onnx", ".pth", ".pt", ".ckpt", ".bin", ".npz")


def register_folder() -> None:
    """Make models/truepose, a folder of the host (and of its extra_model_paths.yaml), to put files into."""
    own = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, own)
    try:
        os.makedirs(own, exist_ok=True)
    except OSError as error:
        log.warning("%s cannot be made (%s); TruePose models are looked for elsewhere only", own, error.strerror)
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, *SUFFIXES})


def lay_out_photos() -> None:
    """Put the photos that workflows start on into the host's temp folder, as truepose/NAME.

    Load Image reads them there as "truepose/NAME [temp]". The host empties that folder at every start, and nobody
    keeps anything in it: the input folder is the user's.
    """
    folder = Path(folder_paths.get_temp_directory()) / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for photo in sorted(PHOTOS.glob("*.jpg")):
            shutil.copyfile(photo, folder / photo.name)
    except OSError as error:
        log.warning("%s cannot be written (%s); choose a photo of your own in the workflows", folder, error.strerror)


def files(suffix: str) -> list[str]:
    """The files in models/truepose that end so, with their subfolders, as the host's lists name them."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if name.lower().endswith(suffix)]


def find(name: str) -> Path:
    """The path of a file that `files` lists."""
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def folders() -> list[Path]:
    """models/truepose and what extra_model_paths.yaml adds, in the host's order."""
    return [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]


def steps(count: int) -> Iterator[int]:
    """0 .. count - 1 with the host's progress bar; the Stop button ends it."""
    bar = comfy.utils.ProgressBar(count)
    for index in range(count):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield index
        bar.update(1)


def download_progress() -> Progress:
    """Shows a download in the host's progress bar; the Stop button ends it and keeps what came."""
    bar = comfy.utils.ProgressBar(1)

    def show(done: int, total: int | None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total or done)

    return show


register_folder()

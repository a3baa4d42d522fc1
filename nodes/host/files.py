"""The host's models folder, its progress bar and its Stop button, for nodes that read and fetch files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths

from truepose_core.networks.known import Progress

FOLDER = "truepose"
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

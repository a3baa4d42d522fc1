"""`truepose models`: which public models the pack can use, which are there, and fetching one when asked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import MEBI, Console, add_report_arguments

if TYPE_CHECKING:
    from truepose_core.networks.known import KnownModel

HELP = "list the public models for photos, and download one"
DESCRIPTION = """\
List the public models that human parsing and pose estimation can use: what each is for, whether it is there, where it
is published and under which licence. `truepose models get NAME` downloads one. Nothing is downloaded unasked.

Models are looked for, and put, in --folder; without it in $TRUEPOSE_MODELS, else in truepose/models in the user's cache
folder (~/.cache on Linux and Mac, %LOCALAPPDATA% on Windows). ComfyUI reads models/truepose in its own folder:
give that to --folder to use one copy for both.
"""
EPILOG = """\
examples:
  truepose models
  truepose models get schp-atr
  truepose models get dwpose yolox-l --folder ComfyUI/models/truepose
  truepose models --json | jq '.models[] | select(.there) | .name'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose models`."""
    parser.add_argument("action", nargs="?", choices=("list", "get"), default="list", help="list (the default) or get")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to get; names as in the list")
    add_models_argument(parser, "--folder")
    add_report_arguments(parser)


def add_models_argument(parser: argparse._ActionsContainer, option: str = "--models") -> None:
    """The folder with the public models."""
    parser.add_argument(
        option,
        dest="models",
        metavar="DIR",
        help="folder with the public models (default: $TRUEPOSE_MODELS, else the user's cache folder)",
    )


def models_folder(args: argparse.Namespace) -> Path:
    """The folder that `add_models_argument` chose."""
    from truepose_core.networks.known import default_folder

    return Path(args.models).expanduser() if args.models else default_folder()


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """List, or download. Returns the JSON report. Raises TruePoseError as `known.get`."""
    from truepose_core.errors import TruePoseError
    from truepose_core.networks.known import KNOWN, known_model

    folder = models_folder(args)
    if args.action == "list" and args.names:
        raise TruePoseError(f"to download write `truepose models get {' '.join(args.names)}`")
    if args.action == "get" and not args.names:
        raise TruePoseError(f"name what to get: {', '.join(KNOWN)}")
    wanted = [known_model(name) for name in dict.fromkeys(args.names)]
    for model in wanted:
        console.say(f"{model.name}: {_fetch(model, folder, args.quiet)}")
    told = [_describe(model, folder) for model in (wanted or KNOWN.values())]
    report = {"folder": str(folder), "models": told}
    if args.action == "list":
        console.say(_table(told, folder))
    console.report(report)
    return report


def _fetch(model: KnownModel, folder: Path, quiet: bool) -> Path:
    from tqdm.auto import tqdm

    from truepose_core.networks.known import find, get

    there = find(model.name, [folder])
    if there is not None:
        return there
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=model.file, disable=quiet) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return get(model.name, folder, progress=show)


def _describe(model: KnownModel, folder: Path) -> dict[str, Any]:
    from truepose_core.networks.known import find

    path = find(model.name, [folder])
    return {
        "name": model.name,
        "purpose": model.purpose,
        "there": path is not None,
        "path": path,
        "file": model.file,
        "page": model.page,
        "url": model.url,
        "bytes": model.size,
        "sha256": model.sha256,
        "licence": model.licence,
        "how": model.how or None,
    }


def _table(told: list[dict[str, Any]], folder: Path) -> str:
    lines = [f"models in {folder}"]
    for model in told:
        size = f", {model['bytes'] / MEBI:.0f} MiB" if model["bytes"] else ""
        lines += [
            "",
            f"{model['name']}: {model['purpose']}{size}",
            f"  {model['path'] if model['there'] else 'not there'}",
            f"  from {model['page']}",
            f"  licence: {model['licence']}",
        ]
        if model["how"]:
            lines.append(f"  {model['how']}")
    return "\n".join(lines)

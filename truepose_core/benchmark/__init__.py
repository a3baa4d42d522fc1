"""`truepose benchmark`: what HPFA costs, as ratios measured side by side in one process.

* steps: a step of the UNet with HPFA over the same step without, for all, 40 % and 25 % of the source's tokens;
* attention: HPFA's spare channels against the same formula with an explicit mask, in time and peak memory;
* kv: projecting the source's K and V at every step against keeping them;
* caa: a step with CAA's decoupled cross-attention over a plain step.

`--host` measures whole guided steps inside a real ComfyUI instead (`host`), `--editors` forwards of editing models,
`--body` the steps that put a body under a picture, `--catalogue` many pictures.

Counted numbers are multiply-adds times two, by torch's FlopCounterMode (`count`). Timed numbers are medians of
interleaved repeats (`timing`): CPU time of one thread in float32, or CUDA events in float16. On a GPU the whole UNet
runs; on a CPU the step is put together from its parts (`parts`), so that the benchmark ends within minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from truepose_core.errors import TruePoseError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose benchmark`."""
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="also write the numbers to this file")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument(
        "--quick", action="store_true", help="one repeat, fewer heads and shapes: rough times in under a minute"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument(
        "--host",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="measure the nodes inside ComfyUI, with its own Python, instead; without FOLDER it is looked for",
    )
    parser.add_argument(
        "--editors",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="count what editing models (FLUX, Qwen-Image-Edit) cost with Guide References, in ComfyUI",
    )
    parser.add_argument(
        "--body", action="store_true", help="seconds to lift, fit, render and carry one person, instead"
    )
    parser.add_argument(
        "--catalogue",
        action="store_true",
        help="what reading a source once for several poses saves, and GPU hours for a million pictures, instead",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="how often each thing is timed, at least once (default: 3 on a CPU, 10 on a GPU)",
    )


def run(args: argparse.Namespace, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure, say the tables, and write `args.report` if given. Returns what is in the file.

    Raises TruePoseError, before any work, for a file that cannot be written, an unknown or missing device, fewer
    than one repeat, or a ComfyUI that is not there.
    """
    from truepose_core.benchmark.body import body_table, measure_body
    from truepose_core.benchmark.host import choose_host, editor_tables, host_tables, measure_host
    from truepose_core.benchmark.measure import measure
    from truepose_core.benchmark.report import tables
    from truepose_core.benchmark.shapes import NETS
    from truepose_core.pictures.files import atomic_write, check_output

    overwrite = getattr(args, "overwrite", False)
    if args.report is not None:
        check_output(args.report, overwrite, (".json",))
    if args.host is not None and args.editors is not None:
        raise TruePoseError("--host and --editors are two measurements; choose one")
    if args.body and (args.host is not None or args.editors is not None):
        raise TruePoseError("--body is a measurement of its own; leave out --host and --editors")
    if args.catalogue and (args.body or args.host is not None or args.editors is not None):
        raise TruePoseError("--catalogue is a measurement of its own; leave out --body, --host and --editors")
    if (
        (args.body or args.catalogue or args.host is not None or args.editors is not None)
        and args.repeats is not None
        and args.repeats < 1
    ):
        raise TruePoseError(f"--repeats is {args.repeats}; expected at least 1")
    if args.body:
        result = measure_body(args.device, args.repeats)
        say(body_table(result))
    elif args.catalogue:
        from truepose_core.benchmark.catalogue import catalogue_tables, measure_catalogue

        result = measure_catalogue(args.repeats)
        say(catalogue_tables(result))
    elif args.host is not None or args.editors is not None:
        editors = args.editors is not None
        host = choose_host(args.editors if editors else args.host)
        what = "editors" if editors else "steps"
        result = measure_host(host, quick=args.quick, device=args.device, repeats=args.repeats, what=what)
        say(editor_tables(result) if editors else host_tables(result))
    else:
        result = measure(
            NETS,
            quick=args.quick,
            device=args.device,
            repeats=args.repeats,
            quiet=getattr(args, "quiet", False),
        )
        say(tables(result))
    if args.report is not None:
        atomic_write(args.report, json.dumps(result, indent=2) + "\n", overwrite)
    return result

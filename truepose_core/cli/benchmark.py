"""`truepose benchmark`: what HPFA costs, counted and timed."""

from __future__ import annotations

import argparse
from typing import Any

from truepose_core.cli.console import Console, add_report_arguments

HELP = "what HPFA costs beside the plain network, counted and timed"
DESCRIPTION = """\
Measure, in one process and as ratios, what a step with HPFA costs beside a plain step at the attention shapes of SD1.5
at 512x768 and SDXL at 1024x768; spare channels against a mask; kept K and V against projecting them at every step.
With --body: seconds to lift, render and carry one person.
With --catalogue: what reading a source once for several poses saves, and GPU hours for a million pictures (counted).
With --host: whole guided steps of an SD1.5-shaped UNet inside ComfyUI, with its own Python, and the memory they add.
With --editors: forwards of FLUX.1 Kontext, FLUX.2 and Qwen-Image-Edit with references, their configurations counted.
"""
EPILOG = """\
examples:
  truepose benchmark --quick
  truepose benchmark --report benchmark.json
  truepose benchmark --catalogue
  truepose benchmark --host ~/ComfyUI
  truepose benchmark --editors ~/ComfyUI
  truepose benchmark --device cuda --repeats 20 --report benchmark.json --overwrite
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose benchmark`."""
    from truepose_core import benchmark

    benchmark.add_arguments(parser)
    add_report_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, print and write."""
    from truepose_core import benchmark

    console.doing("getting ready to measure")
    result = benchmark.run(args, say=console.say)
    if args.report is not None:
        console.say(f"wrote {args.report}")
    console.report(result)
    return result

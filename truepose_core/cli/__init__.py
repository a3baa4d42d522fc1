"""The command `truepose`: one file per command, and nothing heavy imported before a command runs.

Exit codes: 0 done, 2 a wrong input (one line "error: ..." on stderr, nothing half-written), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from truepose_core import __version__
from truepose_core.cli import (
    batch,
    benchmark,
    carry,
    convert,
    data,
    demo,
    evaluate,
    inspect,
    models,
    study,
    train,
    transfer,
)
from truepose_core.cli.console import Console, HelpFormatter, Parser
from truepose_core.errors import TruePoseError

COMMANDS = {
    "demo": demo,
    "transfer": transfer,
    "batch": batch,
    "carry": carry,
    "convert": convert,
    "inspect": inspect,
    "models": models,
    "data": data,
    "train": train,
    "eval": evaluate,
    "study": study,
    "benchmark": benchmark,
}

SEPARATOR = "--"
EPILOG = """\
start here:
  truepose demo --out demo-out            a picture of what the bundled model does, in under a minute
  truepose transfer person.png --pose wave.json --parsing person-parsing.png --out result.png

each command explains itself: truepose transfer --help
exit codes: 0 done, 2 a wrong input (told in one line), 130 stopped by Ctrl-C
"""


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser. Only `command` gets its options: the others would import what they need for nothing."""
    parser = Parser(
        prog="truepose",
        description="The same person, the same clothes, another pose.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
    )
    if command in COMMANDS:
        parser.help_of = f"truepose {command}"
    parser.add_argument("--version", action="version", version=f"truepose {__version__}")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, module in COMMANDS.items():
        sub = choices.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=HelpFormatter,
        )
        if name == command:
            module.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (`sys.argv` by default). Returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        parser = build_parser(command)
        rest: list[str] = []
        if command in COMMANDS and hasattr(COMMANDS[command], "SEPARATOR"):
            # argparse gives what stands behind it to nobody once the positional arguments are taken.
            cut = argv.index(SEPARATOR) if SEPARATOR in argv else len(argv)
            argv, rest = argv[:cut], argv[cut + 1 :]
        args = parser.parse_args(argv)
        args.rest = rest
        with Console(json_on_stdout=args.json, quiet=args.quiet) as console:
            COMMANDS[args.command].run(args, console)
        return 0
    except TruePoseError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("stopped by Ctrl-C" + "".join(f"; {word}" for word in stop.args), file=sys.stderr)
        return 130
    except SystemExit as done:  # argparse ends --help and --version this way
        return int(done.code or 0)

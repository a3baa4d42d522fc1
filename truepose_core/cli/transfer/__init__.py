"""`truepose transfer`: a person shown again in another pose."""

from truepose_core.cli.transfer.command import run
from truepose_core.cli.transfer.options import DESCRIPTION, EPILOG, HELP, add_arguments

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

"""`truepose transfer`: a person shown again in another pose."""

from truepose_core.cli.transfer.command import DESCRIPTION, EPILOG, HELP, add_arguments, run

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "add_arguments", "run"]

"""`truepose batch`: a catalogue of sources and poses."""

from truepose_core.cli.batch.command import DESCRIPTION, EPILOG, HELP, SEPARATOR, add_arguments, run

__all__ = ["DESCRIPTION", "EPILOG", "HELP", "SEPARATOR", "add_arguments", "run"]

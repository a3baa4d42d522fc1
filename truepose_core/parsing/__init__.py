"""Human parsing: which region of a person each pixel shows."""

from truepose_core.parsing.human_parsing import HumanParsing

__all__ = ["HumanParsing"]

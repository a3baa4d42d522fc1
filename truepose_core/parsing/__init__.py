"""Human parsing: which region of a person each pixel shows."""

from truepose_core.parsing.from_keypoints import parse_from_keypoints
from truepose_core.parsing.human_parsing import HumanParsing
from truepose_core.parsing.onnx import choose_parser, open_parser, parse_image

__all__ = ["HumanParsing", "choose_parser", "open_parser", "parse_from_keypoints", "parse_image"]

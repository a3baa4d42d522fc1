"""Reference tokens: editors such as Flux and Qwen-Image-Edit that hold their references in the sequence.

guide.py says what is asked, patch.py puts it on a MODEL, call.py does it in a call of the network.
"""

from .guide import BLOCKS, MOST, ReferenceGuide
from .patch import GREY, KEY, GuidePatch, guides_of, hide_regions, nothing_to_show, with_guide, without_guides

__all__ = [
    "BLOCKS",
    "GREY",
    "KEY",
    "MOST",
    "GuidePatch",
    "ReferenceGuide",
    "guides_of",
    "hide_regions",
    "nothing_to_show",
    "with_guide",
    "without_guides",
]

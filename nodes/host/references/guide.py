"""What is asked of reference tokens: which networks hold them, and how one reference is read (`ReferenceGuide`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.omnigen.omnigen2 import OmniGen2Transformer2DModel
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing

BLOCKS = ("all", "first half", "second half")
MOST = 4
"""References that can be chosen."""


@dataclass(frozen=True)
class Family:
    """Where a kind of network holds its references. blocks: names of its lists of joint blocks, in order. first: the
    references stand in front of the target, not behind it. refined: image tokens attend to each other, and are padded
    to a multiple, before the text joins them."""

    blocks: tuple[str, ...]
    first: bool = False
    refined: bool = False

    def depth(self, unet: torch.nn.Module) -> int:
        """How many joint blocks the network has."""
        return sum(len(getattr(unet, name)) for name in self.blocks)


FAMILIES: dict[type, Family] = {
    Flux: Family(("double_blocks", "single_blocks")),
    QwenImageTransformer2DModel: Family(("transformer_blocks",)),
    OmniGen2Transformer2DModel: Family(("layers",), first=True),
    NextDiT: Family(("layers",), first=True, refined=True),
}
"""Flux: FLUX.1 Kontext, FLUX.2 dev and klein, LongCat-Image-Edit. Qwen: Qwen-Image-Edit, 2509, 2511. NextDiT: Z-Image
Omni; other networks of that class get no references from the host."""


def family_of(model: object) -> Family | None:
    """How a MODEL holds references as tokens; None where it holds none. Raises TruePoseError for a UNet."""
    unet = model.model.diffusion_model
    if isinstance(unet, UNetModel):
        raise TruePoseError(
            f"the model is a {type(model.model.model_config).__name__}, a UNet without reference tokens; use SourceNet "
            "Encode and Apply HPFA with it"
        )
    return next((family for kind, family in FAMILIES.items() if isinstance(unet, kind)), None)


@dataclass(frozen=True, eq=False)
class ReferenceGuide:
    """One Guide References: which reference, and how it is read. Checked when made, never changed afterwards.

    reference: 1 for the first. parsing: of its picture. omega: weight per region, 7 numbers in [0, 1]. beta, gamma:
    region match and body match, >= 0. target: P, and given: whether it is the user's own. body, target_body:
    [B, 18, 3]. sigmas: (highest, lowest) noise at which it works, or None for always. blocks: one of `BLOCKS`.
    keep_positions: tokens of weight 0 stay in the sequence, where nobody reads them.
    """

    reference: int
    parsing: HumanParsing
    omega: tuple[float, ...]
    beta: float = 0.0
    gamma: float = 0.0
    target: HumanParsing | None = None
    given: bool = True
    body: Tensor | None = None
    target_body: Tensor | None = None
    sigmas: tuple[float, float] | None = None
    blocks: str = "all"
    keep_positions: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.reference <= MOST:
            raise TruePoseError(
                f"reference is {self.reference}; expected 1 to {MOST}, in the order of the conditioning"
            )
        if not all(0 <= w <= 1 for w in self.omega):
            raise TruePoseError(f"region weights are {self.omega}; expected numbers from 0 to 1")
        if self.beta < 0 or self.gamma < 0:
            raise TruePoseError(f"region match is {self.beta:g} and body match {self.gamma:g}; expected 0 or more")
        if self.beta > 0 and self.target is None:
            raise TruePoseError(
                f"region_match is {self.beta:g}, but where the regions shall be is not known; connect target_parsing, "
                "or pose and target_pose, or set it to 0"
            )
        if self.gamma > 0 and (self.body is None or self.target_body is None):
            raise TruePoseError(f"body_match is {self.gamma:g}; connect pose and target_pose, or set it to 0")

    def __deepcopy__(self, memo: dict) -> ReferenceGuide:
        return self

    @property
    def matches(self) -> bool:
        """Whether anything depends on the target's position."""
        return self.beta > 0 or self.gamma > 0

    @property
    def has_effect(self) -> bool:
        """False where all weights are 1 and nothing matches."""
        return self.matches or any(w != 1 for w in self.omega)

"""CAA's reader of a person's picture: a vision tower, a resampler, and the cross-attentions that read its tokens."""

from __future__ import annotations

from torch import Tensor, nn

from truepose_core.attention.caa import CAASite, RegionResampler, RegionTokens
from truepose_core.models.config import CAAConfig
from truepose_core.models.processors import attention_sites, key_of
from truepose_core.parsing import HumanParsing


class RegionReader(nn.Module):
    """Vision tower and resampler: a picture of the person and its parsing in, region tokens of width `context` out."""

    def __init__(self, config: CAAConfig, context: int):
        super().__init__()
        from open_clip.transformer import VisionTransformer

        self.config = config
        self.vision = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            mlp_ratio=4.0,
            output_dim=config.width,
            output_tokens=True,
        )
        self.resampler = RegionResampler(
            config.width,
            context,
            dim=config.resampler_dim,
            per_region=config.per_region,
            depth=config.resampler_depth,
            heads=config.heads,
        )

    def forward(self, image: Tensor, parsing: HumanParsing) -> RegionTokens:
        """image [B, 3, H, W] in [0, 1] with its parsing -> region tokens. The background is painted grey."""
        height, width = self.config.image_size
        person = 1 - parsing.masks[:, :1].to(image)
        image = image * person + 0.5 * (1 - person)
        if image.shape[-2:] != (height, width):
            image = nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)
        _, patches = self.vision((image - 0.5) / 0.25)
        rows = parsing.tokens(height // self.config.patch_size, width // self.config.patch_size)
        return self.resampler(patches, rows.to(patches))


class CAA(RegionReader):
    """The region reader, and the decoupled cross-attention of every site of both nets."""

    def __init__(self, config: CAAConfig, context: int, source_net: nn.Module, target_net: nn.Module):
        super().__init__(config, context)

        def sites(net: nn.Module) -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    key_of(name): CAASite(context, block.attn2.inner_dim, block.attn2.heads, config.scale)
                    for name, block in attention_sites(net).items()
                }
            )

        self.source_sites, self.target_sites = sites(source_net), sites(target_net)

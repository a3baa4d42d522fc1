"""CFLD's two encoders, in plain torch: what the source gives to every step, and what the target pose gives.

Source: Lu et al., Coarse-to-Fine Latent Diffusion (arXiv 2402.18078), and its published code. Weights keep the names
they have there, except that timm's Swin counts a stage's downsampling to the next stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from colorsys import hsv_to_rgb
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, gelu, scaled_dot_product_attention, silu

from truepose_core.attention.heads import merge_heads, split_heads
from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import Frame, fit
from truepose_core.json_text import parse_json
from truepose_core.pictures.files import MAX_SIDE
from truepose_core.pose.keypoints import LIMBS
from truepose_core.pose.skeleton import capsule_distance, paint_segments
from truepose_core.weights.settings import read_settings

KIND = "cfld"
HEAD_WIDTH = 32
"""Of every attention in both encoders; shapes do not tell it."""
POSE_CHANNELS = 21
"""A coloured skeleton (3) and one heat map per keypoint (18)."""
UNSHUFFLE = 4
PICTURE = (256, 176)
"""(height, width) that the training pictures had before they were squashed to a square."""
PICTURE_TOLERANCE = 0.02
"""A picture of an aspect ratio this near is squashed as it is, as the published code does; others are padded first."""
SKELETON_COLORS = tuple(tuple(round(255 * x) for x in hsv_to_rgb(i / 18, 1.0, 1.0)) for i in range(18))
LIMB_BRIGHTNESS = 0.6
"""What CFLD was trained to read: a colour for each of the 18 keypoints, and for the limbs, which are darker. Our own
skeletons may look otherwise."""
HEAT_SIGMA = 6.0
LINE_RADIUS, JOINT_RADIUS = 1.65, 3.5
"""Half widths in pixels of a 256 pixel map, as OpenCV paints a line of thickness 2 and a disc of radius 3."""


@dataclass(frozen=True)
class CFLDConfig:
    """Sizes of a CFLD model; the defaults are those of the published one.

    unet: keyword arguments of diffusers' UNet2DConditionModel (4 levels, the last without attention). size: side of the
    square pictures in pixels; the encoders read half of it. swin_*: the vision tower. detail_widths, detail_depth: the
    hybrid-granularity attention, one width per level, finest first. tokens, decoder_depth: the perception-refined
    decoder. pose_widths: of the pose encoder. guidance_*, steps: what its own test run uses.
    """

    unet: dict[str, Any]
    size: int = 512
    swin_width: int = 128
    swin_depths: tuple[int, ...] = (2, 2, 18, 2)
    swin_window: int = 16
    detail_widths: tuple[int, ...] = (64, 128, 256)
    detail_depth: int = 4
    tokens: int = 16
    decoder_depth: int = 8
    pose_widths: tuple[int, ...] = (320, 640, 1280)
    prediction_type: str = "epsilon"
    scheduler: dict[str, Any] = field(default_factory=dict)
    guidance_pose: float = 2.0
    guidance_source: float = 2.0
    steps: int = 50
    kind: str = KIND

    def __post_init__(self) -> None:
        if self.kind != KIND:
            raise TruePoseError(f"the model is of kind {self.kind!r}; expected {KIND!r}")
        if self.size % 64 or not 64 <= self.size <= MAX_SIDE:
            raise TruePoseError(f"size is {self.size}; expected a multiple of 64, at most {MAX_SIDE}")

    @property
    def family(self) -> str:
        return KIND

    @property
    def vae(self) -> None:
        """CFLD's files hold no VAE."""
        return None

    @property
    def encoder_size(self) -> int:
        """Side of the source picture and of the pose map that the encoders read."""
        return self.size // 2

    @property
    def sites(self) -> list[tuple[str, int]]:
        """(attention site, level) of every block whose queries get a bias, in the order of the weights: from the last
        block of the UNet back. Level 0 is the finest."""
        per_level = self.unet["layers_per_block"] + 1
        return [
            (f"up_blocks.{3 - level}.attentions.{j}.transformer_blocks.0", level)
            for level in range(3)
            for j in reversed(range(per_level))
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CFLDConfig:
        """Raises TruePoseError for anything but what `to_json` writes."""
        return read_settings(cls, text, "the model's configuration")


def is_cfld(metadata: Mapping[str, str]) -> bool:
    """Whether a model file with this metadata holds a CFLD model."""
    try:
        config = parse_json(metadata.get("config", "{}"), "the model's configuration")
    except TruePoseError:
        return False
    return isinstance(config, dict) and config.get("kind") == KIND


@dataclass(frozen=True, eq=False)
class SourceCondition:
    """What the source gives to every step. tokens [B, T, c]: the context (coarse). biases: attention site -> [B, N, C],
    added to the queries of its cross-attention (fine); they lie on the target's token grid."""

    tokens: Tensor
    biases: dict[str, Tensor]

    def repeat(self, times: int) -> SourceCondition:
        """Each source `times` in a row."""
        if times == 1:
            return self
        biases = {site: x.repeat_interleave(times, 0) for site, x in self.biases.items()}
        return SourceCondition(self.tokens.repeat_interleave(times, 0), biases)


class Attention(nn.Module):
    """Plain multi-head attention; weights named as in diffusers."""

    def __init__(self, width: int, context: int):
        super().__init__()
        self.heads = width // HEAD_WIDTH
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (split_heads(y, self.heads) for y in projected)
        return self.to_out[0](merge_heads(scaled_dot_product_attention(q, k, v)))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, -1)
        return x * gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class DetailBlock(nn.Module):
    """Two self-attentions and a feed-forward layer, each after a norm and with a residual."""

    def __init__(self, width: int, context: int | None = None):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, width)
        self.attn2 = Attention(width, width if context is None else context)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x))
        return x + self.ff(self.norm3(x))


class RefineBlock(DetailBlock):
    """Cross-attention first, then self-attention; the queries' position is added before both and stays in x."""

    def forward(self, x: Tensor, position: Tensor, source: Tensor) -> Tensor:
        x = x + position
        x = x + self.attn2(self.norm2(x), source)
        x = x + position
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))


class AppearanceEncoder(nn.Module):
    """Hybrid-granularity attention: a picture's features of one level [B, C, h, w] -> biases of that level's sites."""

    def __init__(self, config: CFLDConfig):
        super().__init__()
        self.config = config
        widths = config.unet["block_out_channels"]
        ins, outs, blocks = [], [], []
        for _, level in config.sites:
            inner = config.detail_widths[level]
            ins.append(nn.Conv2d(config.swin_width * 2**level, inner, 1))
            outs.append(nn.Conv2d(inner, widths[level], 1))
            blocks.append(nn.Sequential(*(DetailBlock(inner) for _ in range(config.detail_depth))))
        # The published names; they start at zero there so that training starts from the plain UNet.
        self.zero_conv_ins, self.zero_conv_outs = nn.ModuleList(ins), nn.ModuleList(outs)
        self.blocks = nn.ModuleList(blocks)
        for conv in (*ins, *outs):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        biases = {}
        for i, (site, level) in enumerate(self.config.sites):
            x = self.zero_conv_ins[i](features[level])
            grid = x.shape[2:]
            x = self.blocks[i](x.flatten(2).mT)
            biases[site] = self.zero_conv_outs[i](x.mT.unflatten(2, grid)).flatten(2).mT
        return biases


class Decoder(nn.Module):
    """Perception-refined decoder: learned queries read the coarsest features [B, C, h, w] -> tokens [B, T, c]."""

    def __init__(self, config: CFLDConfig):
        super().__init__()
        width, source = config.unet["cross_attention_dim"], config.swin_width * 8
        cells = (config.encoder_size // 32) ** 2
        self.query_feat = nn.Parameter(0.02 * torch.randn(config.tokens, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(config.tokens, width))
        self.kv_pos_embed = nn.Parameter(0.02 * torch.randn(1, cells, source))
        self.blocks = nn.ModuleList(RefineBlock(width, source) for _ in range(config.decoder_depth))

    def forward(self, feature: Tensor) -> Tensor:
        source = feature.flatten(2).mT + self.kv_pos_embed
        x = self.query_feat.expand(source.shape[0], -1, -1)
        for block in self.blocks:
            x = block(x, self.pos_embed, source)
        return x


class Resnet(nn.Module):
    """Two normed convolutions with a residual, without a timestep."""

    def __init__(self, before: int, after: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, before, eps=1e-6), nn.GroupNorm(32, after, eps=1e-6)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(silu(self.norm2(y)))


class PoseEncoder(nn.Module):
    """Pose maps [B, 21, S, S] -> what is added at the end of the UNet's first levels, [B, C, S/4, S/4] and coarser."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.conv_in = nn.Conv2d(POSE_CHANNELS * UNSHUFFLE**2, widths[0], 1)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.resnets = nn.ModuleList(Resnet(before, after) for before, after in pairs)

    def forward(self, maps: Tensor) -> list[Tensor]:
        x = self.conv_in(nn.functional.pixel_unshuffle(maps, UNSHUFFLE))
        features = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(avg_pool2d(x, 2) if i else x)
            features.append(x)
        return features


class CFLDEncoder(nn.Module):
    """Both encoders and the learned tokens that stand for no source (`learnable_vector` [1, T, c])."""

    def __init__(self, config: CFLDConfig):
        super().__init__()
        from timm.models.swin_transformer import SwinTransformer

        self.config = config
        self.backbone = SwinTransformer(
            img_size=config.encoder_size,
            embed_dim=config.swin_width,
            depths=config.swin_depths,
            num_heads=[config.swin_width * 2**i // HEAD_WIDTH for i in range(4)],
            window_size=config.swin_window,
            drop_path_rate=0.0,
            num_classes=0,
        )
        self.backbone.norm = nn.Identity()  # the features are read before it
        self.appearance_encoder = AppearanceEncoder(config)
        self.pose_encoder = PoseEncoder(config.pose_widths)
        self.decoder = Decoder(config)
        self.learnable_vector = nn.Parameter(torch.randn(1, config.tokens, config.unet["cross_attention_dim"]))

    @property
    def dtype(self) -> torch.dtype:
        return self.learnable_vector.dtype

    def encode_source(self, image: Tensor) -> SourceCondition:
        """image [B, 3, S, S] in [0, 1], S the encoder's size."""
        self._check(image, 3, "the source image is")
        features = self.backbone.forward_intermediates(image.to(self.dtype) * 2 - 1, intermediates_only=True)
        return SourceCondition(self.decoder(features[-1]), self.appearance_encoder(features))

    def encode_pose(self, maps: Tensor) -> list[Tensor]:
        """maps [B, 21, S, S] of `pose_maps` -> one feature map per level with attention, finest first."""
        self._check(maps, POSE_CHANNELS, "the pose maps are")
        return self.pose_encoder(maps.to(self.dtype))

    def _check(self, x: Tensor, channels: int, what: str) -> None:
        side = self.config.encoder_size
        if x.ndim != 4 or tuple(x.shape[1:]) != (channels, side, side):
            raise TruePoseError(f"{what} {tuple(x.shape)}; expected [B, {channels}, {side}, {side}]")


def pose_maps(body: Tensor, side: int) -> Tensor:
    """What CFLD's pose encoder reads: a coloured skeleton (3 channels in [0, 1]) and a Gaussian per keypoint (18).

    body [B, 18, 3], normalised to the picture; missing keypoints (confidence 0) leave their channel empty. Returns
    [B, 21, side, side]. Keypoints are cut to whole pixels, as there. The pixel sizes are those of a 256 pixel map.
    """
    if body.ndim != 3 or body.shape[1:] != (18, 3):
        raise TruePoseError(f"body keypoints are {tuple(body.shape)}; expected [B, 18, 3]")
    scale = side / 256
    pixels, seen = (body[..., :2].float() * side).trunc(), body[..., 2] > 0
    axis = torch.arange(side, device=body.device, dtype=torch.float32)
    across, down = ((axis - pixels[..., i, None]) ** 2 for i in (0, 1))
    heat = torch.exp(-(down[..., :, None] + across[..., None, :]) / (2 * (HEAT_SIGMA * scale) ** 2))
    heat = heat * seen[..., None, None]

    # A keypoint is at the centre of its pixel.
    points = torch.cat([(pixels + 0.5) / side, seen[..., None].float()], -1)
    canvas = points.new_zeros(body.shape[0], 3, side, side)
    colors = canvas.new_tensor(SKELETON_COLORS) / 255
    joints = tuple((i, i) for i in range(18))
    limb_colors = colors[: len(LIMBS)] * LIMB_BRIGHTNESS
    paint_segments(canvas, points, LIMBS, limb_colors, LINE_RADIUS * scale, capsule_distance)
    paint_segments(canvas, points, joints, colors, JOINT_RADIUS * scale, capsule_distance)
    return torch.cat([canvas, heat], 1)


def cfld_frame(size: tuple[int, int], side: int) -> Frame:
    """How a picture of (height, width) becomes CFLD's square of `side` pixels, and back.

    CFLD squashes what it is given, and was trained on 176 x 256. A picture of nearly that aspect ratio is squashed as
    it is; any other is padded to it first, so that the person keeps the proportions that the model knows.
    """
    height, width = size
    off = abs(width * PICTURE[0] / (height * PICTURE[1]) - 1)
    padded = size if off <= PICTURE_TOLERANCE else fit(size, PICTURE).size_padded
    return Frame(size, padded, (side, side))


def squash(image: Tensor, side: int) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] in CFLD's square (`cfld_frame`): [B, 3, side, side]."""
    frame = cfld_frame((image.shape[-2], image.shape[-1]), side)
    # Padding has each picture's own mean colour, so the person's surroundings have no invented edge.
    return torch.cat([frame.apply(x[None], x.mean((1, 2)).tolist()) for x in image.float()])

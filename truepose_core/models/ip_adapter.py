"""IP-Adapter and IP-Adapter Plus weights as a CAA: region tokens without training.

The weights (IP-Adapter, arXiv 2308.06721) make a few tokens of a whole picture. Here the same weights make the same
few tokens for every region of a person: Plus's resampler runs once per region, its queries attending to that region's
patches alone; the plain projection reads one embedding per region, of the picture with only that region visible. Where
one region covers the whole picture, its tokens are those of the original. The tokens per region are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from truepose_core.attention.caa import PerceiverAttention, RegionTokens, region_bias, shown_regions
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.regions import N_REGIONS
from truepose_core.weights.strict import load_strict

PLAIN, PLUS = "ip-adapter", "ip-adapter-plus"
ARCHITECTURE = "ip-adapter"
"""What the metadata of a file may say; the tensors keep the names of the original."""
HEAD = 64
"""Width of a head of the resampler, the same in every published file."""
GREY = 0.5
SITES = {16: "SD1.5 or SD2.x", 70: "SDXL"}

_LAYER = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
_PLACES = {"down_blocks": 0, "input": 0, "up_blocks": 1, "output": 1, "mid_block": 2, "middle": 2}


@dataclass(frozen=True)
class IPAdapterConfig:
    """Sizes of an IP-Adapter, read from shapes.

    kind: `PLAIN` (reads one image embedding per region) or `PLUS` (reads patch tokens). embed: width of what it reads.
    context: width of its tokens. tokens: tokens per region. widths: inner width of every cross-attention, in the file's
    order (see `adapter_order`). dim, depth, inner, hidden: of Plus's resampler, its attention and its feed-forward.
    """

    kind: str
    embed: int
    context: int
    tokens: int
    widths: tuple[int, ...]
    dim: int = 0
    depth: int = 0
    inner: int = 0
    hidden: int = 0

    @property
    def reads_patches(self) -> bool:
        return self.kind == PLUS


def recognise(shapes: Mapping[str, Sequence[int]]) -> IPAdapterConfig | None:
    """What IP-Adapter a file holds, told from keys and shapes alone; None where it holds none.

    Raises TruePoseError for a relative that cannot serve as a CAA (FaceID, Full, Kolors) and for half a file.
    """
    layers = sorted(int(m[1]) for m in map(_LAYER.fullmatch, shapes) if m)
    projection = {name for name in shapes if name.startswith("image_proj.")}
    if not layers and not projection:
        return None
    _refuse_relatives(shapes)
    if not layers or not projection:
        what, lacks = ("image_proj", "ip_adapter") if projection else ("ip_adapter", "image_proj")
        raise TruePoseError(f"the file has the {what} half of an IP-Adapter and not its {lacks} half; get it again")
    if layers != list(range(1, 2 * len(layers), 2)):
        raise TruePoseError(
            f"the IP-Adapter's cross-attentions are numbered {_some(map(str, layers))}; expected 1, 3, 5 and so on: "
            "some are missing"
        )
    first = [shapes[f"ip_adapter.{n}.to_k_ip.weight"] for n in layers]
    widths, context = tuple(int(shape[0]) for shape in first), int(first[0][1])
    if "image_proj.proj.weight" in shapes:
        out, embed = shapes["image_proj.proj.weight"]
        return IPAdapterConfig(PLAIN, int(embed), context, max(1, out // context), widths)
    needed = ("latents", "proj_in.weight", "layers.0.0.to_q.weight", "layers.0.1.1.weight")
    missing = [f"image_proj.{name}" for name in needed if f"image_proj.{name}" not in shapes]
    if missing:
        raise TruePoseError(f"this is no IP-Adapter of a known kind: it lacks {', '.join(missing)}")
    _, tokens, dim = shapes["image_proj.latents"]
    depth = len({name.split(".")[2] for name in projection if name.startswith("image_proj.layers.")})
    return IPAdapterConfig(
        PLUS,
        int(shapes["image_proj.proj_in.weight"][1]),
        context,
        int(tokens),
        widths,
        dim=int(dim),
        depth=depth,
        inner=int(shapes["image_proj.layers.0.0.to_q.weight"][0]),
        hidden=int(shapes["image_proj.layers.0.1.1.weight"][0]),
    )


def _refuse_relatives(shapes: Mapping[str, Sequence[int]]) -> None:
    use = "use an IP-Adapter or IP-Adapter Plus file (ip-adapter_sd15, ip-adapter-plus_sd15, ip-adapter_sdxl_vit-h ...)"
    layered = "image_proj.proj.0.weight" in shapes
    if any("lora" in n or "perceiver_resampler" in n for n in shapes) or (
        layered and "image_proj.norm.weight" in shapes
    ):
        raise TruePoseError(f"this is an IP-Adapter FaceID, which reads another network's face embedding; {use}")
    if layered:
        raise TruePoseError(f"this is an IP-Adapter Full, which has a token for every patch and none per region; {use}")


class _Layer(nn.Module):
    """The K and V projections of one cross-attention, under the file's names."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context, width, bias=False)
        self.to_v_ip = nn.Linear(context, width, bias=False)


class _Projection(nn.Module):
    """One image embedding [..., embed] -> tokens [..., tokens, context]."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.shape = (config.tokens, config.context)
        self.proj = nn.Linear(config.embed, config.tokens * config.context)
        self.norm = nn.LayerNorm(config.context)

    def forward(self, embeds: Tensor) -> Tensor:
        return self.norm(self.proj(embeds).unflatten(-1, self.shape))


class _Resampler(nn.Module):
    """Patch tokens [B, P, embed] and region rows [B, P, R] -> tokens [B, R, tokens, context].

    Every region has the same queries; their logits get the log of the region's row, so a region's tokens say nothing
    of another's patches.
    """

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        dim, self.tokens = config.dim, config.tokens
        self.latents = nn.Parameter(torch.empty(1, config.tokens, dim))
        self.proj_in = nn.Linear(config.embed, dim)
        self.proj_out = nn.Linear(dim, config.context)
        self.norm_out = nn.LayerNorm(config.context)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim, HEAD, config.inner // HEAD),
                    nn.Sequential(
                        nn.LayerNorm(dim),
                        nn.Linear(dim, config.hidden, bias=False),
                        nn.GELU(),
                        nn.Linear(config.hidden, dim, bias=False),
                    ),
                ]
            )
            for _ in range(config.depth)
        )

    def forward(self, patches: Tensor, rows: Tensor) -> Tensor:
        bias = region_bias(rows, self.tokens)
        x = self.proj_in(patches)
        latents = self.latents.repeat(x.shape[0], rows.shape[2], 1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(x, latents, bias)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents)).unflatten(1, (rows.shape[2], self.tokens))


class RegionAdapter(nn.Module):
    """An IP-Adapter that reads a person region by region. Make it with `from_tensors`."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = _Resampler(config) if config.reads_patches else _Projection(config)
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): _Layer(config.context, width) for i, width in enumerate(config.widths)}
        )

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], where: str = "the IP-Adapter", dtype: torch.dtype = torch.float32
    ) -> RegionAdapter:
        """The adapter with these weights. Raises TruePoseError where it is no IP-Adapter of a known kind, or where a
        weight is missing, unknown or of another shape."""
        config = recognise({name: tuple(x.shape) for name, x in tensors.items()})
        if config is None:
            raise TruePoseError(
                f"{where} holds no IP-Adapter (keys such as {_some(tensors)}); expected image_proj.* and ip_adapter.*"
            )
        with torch.device("meta"):
            adapter = cls(config)
        adapter = adapter.to_empty(device="cpu").to(dtype)
        load_strict(adapter, tensors, where)
        return adapter.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, seen: Tensor, rows: Tensor) -> RegionTokens:
        """Region tokens [B, 7 tokens, context] of the person a CLIP vision tower saw.

        seen: [B, P or 1 + P, embed], the tower's last but one hidden states, with or without a class token in front
        (Plus); or [B, 7, embed], its embedding of each region alone (plain). rows: [B, P, 7], region rows of the
        patches. The class token belongs to each region as much as the whole picture does. Regions that the picture
        does not show, and the background, are zero and not shown.
        """
        width = self.config.embed
        if seen.shape[-1] != width:
            raise TruePoseError(
                f"this IP-Adapter reads CLIP vision features of width {width} and got {seen.shape[-1]}; load the "
                f"CLIP vision model it was trained with ({_towers(self.config)})"
            )
        shown = shown_regions(rows)
        shown = torch.cat([torch.zeros_like(shown[:, :1]), shown[:, 1:]], 1)
        rows = rows.to(seen)
        if self.config.reads_patches:
            tokens = self.image_proj(seen, _with_class_token(rows, seen.shape[1]))
        else:
            if seen.shape[1] != N_REGIONS:
                raise TruePoseError(f"expected one embedding for each of {N_REGIONS} regions, got {seen.shape[1]}")
            tokens = self.image_proj(seen)
        tokens = torch.where(shown[..., None, None], tokens, 0.0)
        return RegionTokens(tokens.flatten(1, 2), shown.repeat_interleave(self.config.tokens, 1))

    def no_picture(self, seen: Tensor | None = None) -> Tensor:
        """The tokens of no picture, as in training when the picture is left out: [1, tokens, context].

        seen: for Plus, the tower's hidden states of a picture that is all zeros once normalised, [1, P, embed].
        """
        if self.config.reads_patches:
            return self.image_proj(seen, seen.new_ones((1, seen.shape[1], 1)))[:, 0]
        like = self.image_proj.proj.weight
        return self.image_proj(like.new_zeros((1, self.config.embed)))

    def keys_values(self, tokens: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """K and V [B, T, widths[number]] of tokens [B, T, context] for the cross-attention of that number."""
        layer = self.ip_adapter[str(2 * number + 1)]
        return layer.to_k_ip(tokens), layer.to_v_ip(tokens)


def _with_class_token(rows: Tensor, count: int) -> Tensor:
    if count == rows.shape[1]:
        return rows
    if count != rows.shape[1] + 1:
        raise TruePoseError(
            f"there are {count} patch tokens and {rows.shape[1]} region rows; expected as many, or one more"
        )
    return torch.cat([rows.mean(1, keepdim=True), rows], 1)


def _towers(config: IPAdapterConfig) -> str:
    known = {
        (PLAIN, 768): "ViT-L/14",
        (PLAIN, 1024): "ViT-H/14",
        (PLAIN, 1280): "ViT-bigG/14",
        (PLUS, 1024): "ViT-L/14",
        (PLUS, 1280): "ViT-H/14",
        (PLUS, 1664): "ViT-bigG/14",
    }
    return known.get((config.kind, config.embed), f"width {config.embed}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


# --------------------------------------------------------------------------------------------- where the weights go


def adapter_order(sites: Iterable[str]) -> list[str]:
    """Cross-attention sites in IP-Adapter's order: the way down, the way up, then the middle.

    sites: names in the order of the forward pass, diffusers' ("down_blocks.0.attentions.0...") or the host's
    ("input.1.0"). The order is that of diffusers' attention processors, which the original numbers its layers by.
    """

    def place(site: str) -> int:
        head = site.split(".")[0]
        if head not in _PLACES:
            raise TruePoseError(f"{site!r} is no site of a UNet; expected down_blocks, mid_block or up_blocks")
        return _PLACES[head]

    return sorted(sites, key=place)


def layer_of_site(config: IPAdapterConfig, sites: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Site -> the number of its layer in the file. sites: name -> (inner width, context width), in the order of the
    forward pass. Raises TruePoseError where the IP-Adapter was made for another model."""
    order = adapter_order(sites)
    widths = tuple(sites[site][0] for site in order)
    contexts = {sites[site][1] for site in order}
    if widths != config.widths or contexts != {config.context}:
        theirs = SITES.get(len(config.widths), "another model")
        raise TruePoseError(
            f"this IP-Adapter was made for {theirs} ({len(config.widths)} cross-attentions of context width "
            f"{config.context}), and the model has {len(widths)} of context width "
            f"{', '.join(map(str, sorted(contexts)))}; choose an IP-Adapter for this model"
        )
    return {site: number for number, site in enumerate(order)}


# ------------------------------------------------------------------------------------------------ reading the file


def load_adapter(path: str | Path, dtype: torch.dtype = torch.float32) -> RegionAdapter:
    """The adapter in a file (.safetensors, or the original's .bin). Raises TruePoseError when the file is missing,
    damaged, quantised, a pickle with code in it, or not an IP-Adapter of a known kind."""
    from truepose_core.weights.reading import CheckpointReader, refuse_quantised

    with CheckpointReader(path) as reader:
        where = reader.path.name
        refuse_quantised(reader.infos(), where)
        return RegionAdapter.from_tensors({name: reader.tensor(name) for name in reader.infos()}, where, dtype)


# ------------------------------------------------------------------------------------------ the picture CLIP sees


def person_square(image: Tensor, parsing: HumanParsing) -> tuple[Tensor, HumanParsing]:
    """The person cut out as a square, [1, 3, S, S] in [0, 1], with its parsing: CLIP towers see squares.

    image: [1, 3, H, W] with its parsing. The square is the smallest that holds every pixel which is a person rather
    than background, and lies around its middle; what falls outside the picture is grey background.
    """
    person = parsing.labels()[0] > 0
    height, width = parsing.size
    if bool(person.any()):
        down, across = person.any(1).nonzero()[:, 0], person.any(0).nonzero()[:, 0]
        box = (int(down[0]), int(down[-1]) + 1, int(across[0]), int(across[-1]) + 1)
    else:
        box = (0, height, 0, width)
    top, bottom, left, right = box
    side = max(bottom - top, right - left)
    top, left = (top + bottom - side) // 2, (left + right - side) // 2
    edges = (-left, left + side - width, -top, top + side - height)
    masks = parsing.masks
    background = pad(masks[:, :1], edges, value=1.0)
    square = HumanParsing(torch.cat([background, pad(masks[:, 1:], edges, value=0.0)], 1))
    return pad(image, edges, value=GREY), square


def on_grey(image: Tensor, mask: Tensor) -> Tensor:
    """image [B, 3, H, W] where mask [B, H, W] is 1, grey elsewhere."""
    mask = mask[:, None].to(image)
    return image * mask + GREY * (1 - mask)


def region_pictures(image: Tensor, parsing: HumanParsing) -> Tensor:
    """The picture with one region at a time visible on grey: [7, 3, H, W]. image: [1, 3, H, W]."""
    return torch.cat([on_grey(image, parsing.masks[:, r]) for r in range(N_REGIONS)])


def patch_rows(parsing: HumanParsing, count: int) -> Tensor:
    """Region rows [1, P, 7] of the square grid of patches of a tower that gives `count` tokens, P or P + 1."""
    side = isqrt(count)
    if side * side not in (count, count - 1) or count < 1:
        raise TruePoseError(
            f"the CLIP vision model gives {count} tokens; expected a square grid, with or without a class token"
        )
    return parsing.tokens(side, side)

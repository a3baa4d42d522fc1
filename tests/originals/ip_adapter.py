"""IP-Adapter (github.com/tencent-ailab/IP-Adapter) beside this package: see README.md."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import patch

import common
import torch
from common import SD15, FullSize, Row
from leffa import SDXL
from torch import Tensor, nn
from torch.nn.functional import one_hot

if TYPE_CHECKING:
    from truepose_core.attention.caa import RegionTokens
    from truepose_core.models.ip_adapter import RegionAdapter

BATCH, PATCHES, WORDS, POSITIONS = 2, 256, 77, 64
UPPER, REGIONS = 3, 7
SCALES = (1.0, 0.6)


@dataclass(frozen=True)
class Kind:
    """A published file. maker: the original's class. embed: the width of what CLIP's tower hands on (ViT-H/14, for
    ip-adapter_sdxl ViT-bigG/14). tokens: as in its demonstrations."""

    maker: str
    unet: Mapping[str, object]
    embed: int
    tokens: int

    @property
    def plus(self) -> bool:
        return "Plus" in self.maker


KINDS = {
    "ip-adapter_sd15": Kind("IPAdapter", SD15, 1024, 4),
    "ip-adapter-plus_sd15": Kind("IPAdapterPlus", SD15, 1280, 16),
    "ip-adapter_sdxl": Kind("IPAdapterXL", SDXL, 1280, 4),
    "ip-adapter-plus_sdxl_vit-h": Kind("IPAdapterPlusXL", SDXL, 1280, 16),
}


def original(clone: Path, work: Path) -> None:
    from diffusers import UNet2DConditionModel

    full = []
    for seed, (name, kind) in enumerate(KINDS.items()):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**kind.unet)
            adapter = made(kind, unet, "meta")
            adapter.set_ip_adapter()
            layers = nn.ModuleList(unet.attn_processors.values())
            weights = nn.ModuleDict({"image_proj": adapter.init_proj(), "ip_adapter": layers}).state_dict()
        full.append(FullSize(name, "", {name: weights}))
        run(name, kind, unet, work, seed)
    common.save_full_size(work, *full)


def made(kind: Kind, unet: nn.Module, device: str) -> SimpleNamespace:
    """The original's adapter without the pictures' tower and without a file: what it needs to build its parts."""
    import ip_adapter

    adapter = object.__new__(getattr(ip_adapter, kind.maker))
    adapter.device, adapter.num_tokens = device, kind.tokens
    adapter.pipe = SimpleNamespace(unet=unet)
    tower = SimpleNamespace(projection_dim=kind.embed, hidden_size=kind.embed)
    adapter.image_encoder = SimpleNamespace(config=tower)
    return adapter


def run(name: str, kind: Kind, unet: nn.Module, work: Path, seed: int) -> None:
    """The projection, and one cross-attention of each width; the file has these alone."""
    from diffusers.models.attention_processor import Attention
    from ip_adapter.ip_adapter import AttnProcessor, IPAttnProcessor

    generator = torch.Generator().manual_seed(seed)
    context = kind.unet["cross_attention_dim"]
    projection = common.randomised(made(kind, unet, "cpu").init_proj().float(), seed)
    seen = torch.randn((BATCH, 1 + PATCHES, kind.embed) if kind.plus else (BATCH, kind.embed), generator=generator)
    tokens = projection(seen)
    nothing = projection(seen[:1] if kind.plus else torch.zeros_like(seen[:1]))

    widths = {site: processor.hidden_size for site, processor in unet.attn_processors.items() if "attn2" in site}
    heads = {widths[site]: unet.get_submodule(site.removesuffix(".processor")).heads for site in widths}
    layers, sites = [], []
    for width, count in sorted(heads.items()):
        processor = IPAttnProcessor(width, context, num_tokens=kind.tokens)
        attention = Attention(width, context, heads=count, dim_head=width // count, processor=processor)
        common.randomised(attention, seed + width)
        x = torch.randn((BATCH, POSITIONS, width), generator=generator)
        words = torch.randn((BATCH, WORDS, context), generator=generator)
        out = []
        for scale in SCALES:
            processor.scale = scale
            out.append(attention(x, encoder_hidden_states=torch.cat([words, tokens], 1)))
        weights = {key: value for key, value in attention.state_dict().items() if not key.startswith("processor.")}
        kv = [processor.to_k_ip(tokens), processor.to_v_ip(tokens)]
        sites.append({"heads": count, "weights": weights, "x": x, "words": words, "kv": kv, "out": out})
        layers += [AttnProcessor(), processor]
    halves = {"image_proj": projection, "ip_adapter": nn.ModuleList(layers)}
    torch.save({half: part.state_dict() for half, part in halves.items()}, work / f"{name}.bin")
    results = {"seen": seen, "tokens": tokens, "nothing": nothing, "sites": sites, "widths": widths}
    torch.save(results, work / f"{name}.pt")


def ours(work: Path) -> list[Row]:
    from truepose_core.models.ip_adapter import load_adapter

    return [row for name in KINDS for row in rows_of(name, load_adapter(work / f"{name}.bin"), common.load(work, name))]


def rows_of(name: str, adapter: RegionAdapter, run: Mapping[str, object]) -> list[Row]:
    """One region covers the whole picture."""
    seen = run["seen"]
    rows = one_hot(torch.full((BATCH, PATCHES), UPPER), REGIONS).float()
    plus = adapter.config.reads_patches
    found = adapter(seen if plus else seen[:, None].expand(-1, REGIONS, -1), rows)
    region = slice(UPPER * adapter.config.tokens, (UPPER + 1) * adapter.config.tokens)
    kv = [y[:, region] for i in range(len(run["sites"])) for y in adapter.keys_values(found.tokens, i)]
    widths = ", ".join(map(str, adapter.config.widths))
    attended = [attend(adapter, i, site, found) for i, site in enumerate(run["sites"])]
    numbers, expected = layer_numbers(adapter, run["widths"])
    return [
        Row(f"{name}: tokens of a picture", [found.tokens[:, region]], [run["tokens"]]),
        Row(f"{name}: tokens of no picture", [adapter.no_picture(seen[:1] if plus else None)], [run["nothing"]]),
        Row(f"{name}: K and V, widths {widths}", kv, [y for site in run["sites"] for y in site["kv"]]),
        *(
            Row(
                f"{name}: cross-attention, scale {scale}, widths {widths}",
                [out[i] for out in attended],
                [site["out"][i] for site in run["sites"]],
            )
            for i, scale in enumerate(SCALES)
        ),
        Row(f"{name}: the layer of each of {len(numbers)} cross-attentions", [numbers], [expected], 0.0),
    ]


def attend(adapter: RegionAdapter, number: int, run: Mapping[str, object], found: RegionTokens) -> list[Tensor]:
    """At each scale, one cross-attention with CAA beside it: the adapter's projections, no prior, kappa 0."""
    from diffusers.models.attention_processor import Attention

    from truepose_core.attention.caa import CAASite
    from truepose_core.models.processors import CrossAttention, TargetPass

    width, context, heads = adapter.config.widths[number], adapter.config.context, run["heads"]
    attention = Attention(width, context, heads=heads, dim_head=width // heads)
    attention.load_state_dict(run["weights"])
    layer, out = adapter.ip_adapter[str(2 * number + 1)], []
    for scale in SCALES:
        caa = CAASite(context, width, heads, scale, kappa=0.0)
        caa.to_k, caa.to_v = layer.to_k_ip, layer.to_v_ip
        attention.set_processor(CrossAttention("site", caa))
        call = TargetPass((1, POSITIONS), caa=found)
        out.append(attention(run["x"], encoder_hidden_states=run["words"], truepose=call))
    return out


def layer_numbers(adapter: RegionAdapter, widths: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Of every site at full size, as this package finds them from the forward pass and as the original counts."""
    from truepose_core.models.ip_adapter import layer_of_site

    theirs = {site: number for number, site in enumerate(widths)}
    forward = [site for place in ("down_blocks", "mid_block", "up_blocks") for site in widths if site.startswith(place)]
    sizes = {site: (widths[site], adapter.config.context) for site in forward}
    found = layer_of_site(replace(adapter.config, widths=tuple(widths.values())), sizes)
    return tuple(torch.tensor([numbers[site] for site in forward]).float() for numbers in (found, theirs))


def print_keys(models: Sequence[Mapping[str, object]]) -> bool:
    """As `common.print_keys`, of weights that are read under the original's names: whether none is left over."""
    from truepose_core.models.ip_adapter import RegionAdapter, recognise

    print("\n| weights at full size | tensors | taken | missing | unexplained | other shape |")
    print("|---|---|---|---|---|---|")
    good = True
    for model in models:
        (given,) = model["files"].values()
        with torch.device("meta"):
            weights = RegionAdapter(recognise(given)).state_dict()
        both = given.keys() & weights.keys()
        shapes = [key for key in both if list(weights[key].shape) != given[key]]
        missing, unexplained = weights.keys() - both, given.keys() - both
        good &= not (missing or unexplained or shapes)
        counts = map(len, (given, both, missing, unexplained, shapes))
        print(f"| {model['title']} | " + " | ".join(f"{n:,}" for n in counts) + " |")
    return good


if __name__ == "__main__":
    # An IP-Adapter's file is read as it is: it has no family of conversions.
    with patch.object(common, "print_keys", print_keys):
        sys.exit(common.main("IP-Adapter", original, ours))

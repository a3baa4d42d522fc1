"""CLIP vision towers of open_clip, from a file the user has. Nothing is ever downloaded."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truepose_core.errors import TruePoseError
from truepose_core.weights.strict import load_strict

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's normalisation, which open_clip takes where a tower names no other."""
PREFIXES = ("visual.", "model.visual.", "module.visual.")


@lru_cache(maxsize=1)
def architectures() -> dict[str, dict[str, Any]]:
    """open_clip's architectures with a transformer as vision tower: name -> its configuration. {} without open_clip.

    Read from the package's own files, without importing it: that takes seconds, and menus ask for the names.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return {}
    found = {}
    for path in sorted((Path(spec.origin).parent / "model_configs").glob("*.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        vision = config.get("vision_cfg", {})
        timm = vision.get("timm_model_name")
        if isinstance(vision.get("layers"), int) if timm is None else timm.startswith(("vit_", "eva")):
            found[path.stem] = config
    return found


class Seen(NamedTuple):
    """What a tower says of pictures. last, before: hidden states after the last and the last but one layer,
    [B, P or 1 + P, width], a class token in front. embedding: [B, embed_dim]."""

    last: Tensor
    before: Tensor
    embedding: Tensor


class VisionTower(nn.Module):
    """A tower with what must be done to pictures first. image_size: (height, width); mean, std: per colour."""

    def __init__(self, name: str, visual: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.name, self.visual = name, visual
        self.mean, self.std = tuple(mean), tuple(std)
        size = visual.image_size
        self.image_size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, pixels: Tensor) -> Seen:
        """pixels [B, 3, *image_size], normalised."""
        out = self.visual.forward_intermediates(pixels, indices=2, output_fmt="NLC", output_extra_tokens=True)
        states = out["image_intermediates"]
        prefix = out.get("image_intermediates_prefix") or [states[0][:, :0]] * 2
        before, last = (torch.cat(pair, 1) for pair in zip(prefix, states, strict=True))
        return Seen(last, before, out["image_features"])


def vision_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The vision tower's weights of a file, under the tower's own names: of a whole CLIP model or of the tower alone.

    Raises TruePoseError for other layouts.
    """
    for prefix in PREFIXES:
        found = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        if found:
            return found
    if any(name.startswith(("conv1.", "trunk.")) for name in tensors):
        return dict(tensors)
    keys = ", ".join(sorted(tensors)[:3])
    if any(name.startswith("vision_model.") for name in tensors):
        raise TruePoseError(
            f"{where} has the transformers layout (keys such as {keys}); load it with ComfyUI's own Load CLIP Vision, "
            "which goes to the same places"
        )
    raise TruePoseError(f"{where} holds no vision tower of open_clip (keys such as {keys}); expected visual.*")


def recognise_tower(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Names of the architectures whose tower has exactly these weights and that differ in what they compute, the
    shortest name of each kind. shapes: name -> shape, as `vision_tensors` names them."""
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    kinds: dict[str, str] = {}
    for name in sorted(architectures(), key=lambda n: (len(n), n)):
        config = architectures()[name]
        if "hf_model_name" in config["text_cfg"] or not _may_fit(config, shapes):
            continue  # those borrow the tower of another architecture and add a text model
        kind = json.dumps([config["vision_cfg"], bool(config.get("quick_gelu")), _normalisation(name)], sort_keys=True)
        if kind in kinds:
            continue
        with torch.device("meta"):
            tower = _build(name)
        if {key: tuple(x.shape) for key, x in tower.state_dict().items()} == shapes:
            kinds[kind] = name
    return list(kinds.values())


def load_tower(tensors: Mapping[str, Tensor], where: str, name: str | None = None) -> VisionTower:
    """A tower with the weights of a file, in float32.

    name: of the architecture, as open_clip calls it; None to tell it from the shapes. Raises TruePoseError where
    open_clip is missing or too old, the architecture is unknown or cannot be told, or the weights do not fit it.
    """
    if not architectures():
        raise TruePoseError("open_clip is not installed; run: pip install open_clip_torch")
    own = vision_tensors(tensors, where)
    if name is None:
        names = recognise_tower({key: x.shape for key, x in own.items()})
        if len(names) != 1:
            what = (
                f"{', '.join(names)} all have such weights"
                if names
                else "no architecture of open_clip has such weights"
            )
            raise TruePoseError(f"{where}: {what}; choose the architecture that the file's publisher names")
        name = names[0]
    if name not in architectures():
        raise TruePoseError(f"open_clip has no architecture {name!r} with a transformer as vision tower")
    with torch.device("meta"):
        visual = _build(name)
    if {key for key, _ in visual.named_buffers()} - set(visual.state_dict()):
        visual = _build(name)  # with tables that no file carries, so they must be computed
    else:
        visual = visual.to_empty(device="cpu")
    load_strict(visual, own, f"{where} as {name}")
    if not hasattr(visual, "forward_intermediates"):
        raise TruePoseError("open_clip is too old; run: pip install --upgrade open_clip_torch")
    return VisionTower(name, visual.eval().requires_grad_(False), *_normalisation(name))


def _build(name: str) -> nn.Module:
    # open_clip's public functions build the text tower too, and for some that means a download.
    from open_clip.model import _build_vision_tower

    config = architectures()[name]
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    return _build_vision_tower(config["embed_dim"], vision, config.get("quick_gelu", False)).float()


def _may_fit(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether patch, width and picture size agree; building a tower to compare all its weights takes longer."""
    vision = config["vision_cfg"]
    if "timm_model_name" not in vision:
        patch, width = vision.get("patch_size", 16), vision.get("width", 768)
        places = (vision.get("image_size", 224) // patch) ** 2 + 1
        return (
            shapes.get("conv1.weight") == (width, 3, patch, patch)
            and shapes.get("positional_embedding") == (places, width)
            and f"transformer.resblocks.{vision.get('layers', 12) - 1}.ln_1.weight" in shapes
        )
    patch = shapes.get("trunk.patch_embed.proj.weight", (0, 0, 1, 1))[-1]
    places = (vision.get("image_size", 224) // patch) ** 2
    table = shapes.get("trunk.pos_embed", (1, 0, 0))
    heads = ("head.proj.weight",) if vision.get("timm_proj") == "linear" else ()
    return len(table) == 3 and table[1] in (places, places + 1) and all(name in shapes for name in heads)


@lru_cache(maxsize=256)
def _normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) on which all of open_clip's published weights of this architecture agree, else OpenAI's."""
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model

    known = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    pairs = {(tuple(c.get("mean") or CLIP_MEAN), tuple(c.get("std") or CLIP_STD)) for c in known}
    return pairs.pop() if len(pairs) == 1 else (CLIP_MEAN, CLIP_STD)

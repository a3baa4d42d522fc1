"""What a model reads beside the noisy latent and its source: pose pictures, channels, a picture's CLIP embedding."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import Frame
from truepose_core.models.config import SKELETON
from truepose_core.models.model import TruePoseModel
from truepose_core.models.vision_tower import CLIP_MEAN, CLIP_STD
from truepose_core.pose.skeleton import draw_skeleton

DENSEPOSE = "densepose"


def picture_embedding(encoder: torch.nn.Module, image: Tensor, width: int) -> Tensor:
    """The CLIP embedding of pictures [S, 3, H, W] in [0, 1], as one token each: [S, 1, width]. encoder: a transformers
    CLIPVisionModelWithProjection. Raises TruePoseError for an encoder of another width."""
    side = encoder.config.image_size
    # On 8 bits with Pillow, so that the embedding is the original's to the last pixel.
    bytes_ = (image * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    squares = [np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC)) for x in bytes_]
    square = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255
    mean, std = (square.new_tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    device = next(encoder.parameters()).device
    embeds = encoder(((square - mean) / std).to(device, encoder.dtype)).image_embeds[:, None]
    if embeds.shape[-1] != width:
        raise TruePoseError(
            f"the image encoder gives embeddings of width {embeds.shape[-1]} and the model reads {width}; "
            "give the encoder that the model was trained with"
        )
    return embeds


def pose_pictures(
    model: TruePoseModel,
    given: Tensor | Mapping[str, Tensor | None] | None,
    body: Tensor,
    frame: Frame,
    device: torch.device,
) -> dict[str, Tensor]:
    """The pose pictures that the model reads, in its canvas; the skeleton is drawn where it is not given."""
    behaviour = model.config.behaviour
    names = behaviour.pose_maps + ((DENSEPOSE,) if DENSEPOSE in behaviour.channels else ())
    if model.controlnet is not None:
        names = (SKELETON,)
    maps = {SKELETON: given} if isinstance(given, Tensor) else dict(given or {})
    missing = [name for name in names if name not in maps and name != SKELETON]
    unknown = [name for name in maps if name not in names]
    if missing or unknown:
        wrong = f"{', '.join(missing)} missing" if missing else f"{', '.join(unknown)} unknown"
        raise TruePoseError(
            f"this model reads the pose maps {', '.join(names) or 'none'}: {wrong}. "
            "Give pictures by name; None leaves one out"
        )
    if SKELETON in names and SKELETON not in maps:
        maps[SKELETON] = draw_skeleton(body, *frame.size_model)
    elif maps.get(SKELETON) is not None:
        maps[SKELETON] = frame.apply(maps[SKELETON].float(), 0.0)
    for name in set(maps) - {SKELETON}:
        maps[name] = None if maps[name] is None else frame.apply(maps[name].float(), 0.0)
    found = {name: maps[name].to(device) for name in names if maps[name] is not None}
    if names and not found:
        raise TruePoseError(f"every pose map is left out; expected at least one of {', '.join(names)}")
    return found


def encode_channels(
    model: TruePoseModel,
    densepose: Tensor | None,
    canvas: Tensor | None,
    mask: Tensor | None,
    frame: Frame,
    batch: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """What conv_in reads beside the noisy latent, with the pose and without it, for the batch; None for nothing."""
    if (canvas is None) != (mask is None):
        raise TruePoseError("canvas and mask belong together: give both, or neither to make the whole picture")
    if not model.config.behaviour.channels:
        if canvas is not None:
            raise TruePoseError("this model makes whole pictures; leave out canvas and mask")
        return None, None
    if canvas is None:
        canvas = torch.full((1, 3, *frame.size_model), 0.5, device=device)
        mask = torch.ones((1, 1, *frame.size_model), device=device)
    else:
        canvas = frame.apply(canvas.float(), canvas.mean((0, 2, 3)).tolist()).to(device)
        mask = frame.apply(mask.float(), 0.0).to(device)
    given = [x for x in (canvas, mask, densepose) if x is not None]
    count = max(x.shape[0] for x in given)
    if batch % count or any(x.shape[0] not in (1, count) for x in given):
        counts = ", ".join(str(x.shape[0]) for x in given)
        raise TruePoseError(
            f"canvas, mask and DensePose are {counts} pictures for {batch} poses; expected 1 or {batch}"
        )
    canvas, mask = canvas.expand(count, -1, -1, -1), mask.expand(count, -1, -1, -1)
    densepose = None if densepose is None else densepose.expand(count, -1, -1, -1)
    made = [model.encode_channels(x, canvas, mask) for x in (densepose, None)]
    return tuple(x.repeat_interleave(batch // count, 0) for x in made)

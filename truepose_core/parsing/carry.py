"""The skeleton prior: every pixel in the frame of its nearest limb, no weights needed.

Limb coordinates (`truepose_core.pose.limbs`) name the same place on the body in every pose. Two things follow:

* `carry`: where in the source a target pixel came from, as a sampling grid;
* `region_prior` and `warp`: the source's parsing and pixels carried to the target pose.

Lengths are in image heights. Keypoints are [B, 18, 3]: x/width, y/height, confidence (0 = missing).
The construction is ours (design: pose alignment by a skeleton prior).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.pose.limbs import _centres, _nearest, _on_body, body_coordinates, from_limbs, limb_frames
from truepose_core.regions import Region


def carry(
    source_body: Tensor,
    target_body: Tensor,
    height: int,
    width: int,
    aspect: float | None = None,
    source_aspect: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Where each target cell was in the source: (grid [B, height, width, 2] in [-1, 1] for `grid_sample` with
    align_corners=False, certainty [B, height, width] in [0, 1]).

    source_body, target_body: [B, 18, 3]. aspect: width / height of the target image, by default that of the grid;
    source_aspect: of the source image, by default the same.

    Certainty is 0 off the body, where the limb is missing in the source and outside the source image; it is
    halved where one pose shows the front and the other the back.
    """
    aspect = width / height if aspect is None else aspect
    source_aspect = aspect if source_aspect is None else source_aspect
    source, target = limb_frames(source_body, source_aspect), limb_frames(target_body, aspect)
    batch = target_body.shape[0]
    centres = _centres(height, width, target_body.device, target_body.dtype).expand(batch, -1, -1)
    limb, t, d, distance = _nearest(target, centres * target_body.new_tensor([aspect, 1.0]))
    place = from_limbs(source, limb, t, d) / target_body.new_tensor([source_aspect, 1.0])
    certain = _on_body(distance) * source.valid.gather(1, limb)
    certain = certain * ((place > 0) & (place < 1)).all(-1)
    certain = certain * torch.where(source.facing == target.facing, 1.0, 0.5)[:, None]
    grid = torch.where((certain > 0)[..., None], place, centres) * 2 - 1
    return grid.reshape(batch, height, width, 2), certain.reshape(batch, height, width)


def region_prior(
    parsing: HumanParsing,
    source_body: Tensor,
    target_body: Tensor,
    height: int,
    width: int,
    aspect: float | None = None,
) -> HumanParsing:
    """The source's parsing carried to the target pose: P of HPFA where nothing better is known.

    parsing: the source's, [B, 7, H, W]. Result [B, 7, height, width]. aspect: width / height of the target image, by
    default that of the grid. Off the body it says background; on a limb that the source does not show, what the
    source's person is on the whole; a head seen from behind shows hair where the source shows its face.
    """
    masks = parsing.masks
    source_aspect = masks.shape[-1] / masks.shape[-2]
    aspect = width / height if aspect is None else aspect
    grid, certain = carry(source_body, target_body, height, width, aspect, source_aspect)
    carried = grid_sample(masks, grid.to(masks), padding_mode="border", align_corners=False)
    back = limb_frames(target_body, aspect).facing < limb_frames(source_body, source_aspect).facing
    face, hair = carried[:, Region.FACE], carried[:, Region.HAIR]
    turned = carried.clone()
    turned[:, Region.HAIR], turned[:, Region.FACE] = face + hair, torch.zeros_like(face)
    carried = torch.where(back[:, None, None, None], turned, carried)
    on_body = body_coordinates(target_body, height, width, aspect)[..., 2].reshape(-1, 1, height, width) > 0
    person = masks.sum((2, 3), keepdim=True)
    person = torch.cat([torch.zeros_like(person[:, :1]), person[:, 1:]], 1)
    nobody = torch.zeros_like(person)
    nobody[:, Region.BACKGROUND] = 1
    whole = torch.where(person.sum(1, keepdim=True) > 0, person / person.sum(1, keepdim=True).clamp(min=1e-6), nobody)
    carried = torch.where((certain > 0)[:, None], carried, torch.where(on_body, whole, nobody))
    return HumanParsing(carried / carried.sum(1, keepdim=True))


def prior_for_poses(
    parsing: HumanParsing, body: Tensor, target_body: Tensor, size: tuple[int, int] | None = None
) -> HumanParsing:
    """The sources' parsing carried along the skeleton from their keypoints body [S, 18, 3] to the target poses
    [T, 18, 3]. size: (height, width) of the result, by default the parsing's own."""
    count, batch = target_body.shape[0], parsing.batch
    if count > 1 and batch > 1 and count != batch:
        raise TruePoseError(
            f"there are {count} target poses and {batch} source images; expected as many, or 1 of either"
        )
    total = max(count, batch)
    masks = HumanParsing(parsing.masks.expand(total, -1, -1, -1))
    return region_prior(masks, body.expand(total, -1, -1), target_body.expand(total, -1, -1), *(size or parsing.size))


def region_colors(image: Tensor, parsing: HumanParsing) -> tuple[Tensor, Tensor]:
    """Mean colour of each region: ([B, 7, 3] in [0, 1], seen [B, 7] bool). Unseen regions get the person's mean.

    image: [B, 3, H, W]; parsing of the same size.
    """
    weight = parsing.masks.flatten(2)
    total = weight.sum(-1)
    colors = torch.einsum("brp,bcp->brc", weight, image.flatten(2)) / total.clamp(min=1e-6)[..., None]
    person = 1 - weight[:, Region.BACKGROUND]
    mean = (image.flatten(2) * person[:, None]).sum(-1) / person.sum(-1, keepdim=True).clamp(min=1e-6)
    seen = total > 0.5
    return torch.where(seen[..., None], colors, mean[:, None]), seen


def warp(image: Tensor, parsing: HumanParsing, source_body: Tensor, target_body: Tensor) -> tuple[Tensor, Tensor]:
    """The source image carried to the target pose, without a network: ([B, 3, H, W] in [0, 1], certain [B, 1, H, W]).

    Where the prior is uncertain (certain <= 0.75) the region's mean colour is used. image and parsing: the source's, of
    the same size.
    """
    height, width = image.shape[-2:]
    grid, certain = carry(source_body, target_body, height, width)
    pixels = grid_sample(image, grid.to(image), padding_mode="border", align_corners=False)
    prior = region_prior(parsing, source_body, target_body, height, width)
    colors, _ = region_colors(image, parsing)
    flat = torch.einsum("brc,brhw->bchw", colors, prior.masks)
    person = 1 - prior.masks[:, Region.BACKGROUND : Region.BACKGROUND + 1]
    certain = certain.to(image)[:, None]
    mix = (certain > 0.75).to(image) * person
    return (mix * pixels + (1 - mix) * flat).clamp(0, 1), certain

"""Aligned tokens: what SourceNet read of a source, brought to another pose and put beside what it read (RePoseDM, arXiv
2310.16074, aligns texture features so; where to look them up comes from `alignment.recurrent`, and the rest is ours).

The source's tokens stay as they are. Behind them come the same tokens once more, each level's grid looked up where
alignment looks the picture up, at the target's places, with the target's regions; a token counts as much as the source
really showed its surface. A net that attends to the source then finds the right token where it stands.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from truepose_core.alignment.recurrent import AlignedPerson, align_person
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region
from truepose_core.source.combine import CombinedFeatures, stacked
from truepose_core.source.features import Level, SourceFeatures


def align_source(
    source: SourceFeatures,
    image: Tensor,
    target_body: Tensor,
    *,
    steps: int | None = None,
    kind: type[CombinedFeatures] = CombinedFeatures,
) -> tuple[CombinedFeatures, AlignedPerson]:
    """The source with its tokens aligned to target poses beside its own, and what alignment made of the picture.

    source: of S people with keypoints. image: [S, 3, H, W] in [0, 1], the picture that was read, of the size of
    `source.parsing`. target_body: T poses [T, 18, 3] on pictures of that shape; T a multiple of S. steps: as in
    `align_person`. The result is of T people, each for its own pose.

    Raises TruePoseError for a source without keypoints, one that is combined, carried or read during sampling, another
    picture, and as `align_person`.
    """
    if source.body is None:
        raise TruePoseError("the source was read without its pose; connect the pose at SourceNet Encode")
    if isinstance(source, CombinedFeatures) or not source.sites or source.latent is not None:
        raise TruePoseError(
            "only a single source that is read before the sampling can be aligned; combine sources behind alignment, "
            "and read the source once or at noise levels"
        )
    if source.image is not None:
        raise TruePoseError("this model aligns its source to the target pose by itself; take its source as it is")
    size = (image.shape[-2], image.shape[-1])
    if len(image) != source.batch or size != source.parsing.size:
        raise TruePoseError(
            f"the source was read from {source.batch} pictures of {source.parsing.size[1]}x{source.parsing.size[0]}, "
            f"and {len(image)} of {size[1]}x{size[0]} are given; give the picture that SourceNet Encode read"
        )
    made = align_person(image, source.parsing.to("cpu"), source.body.cpu(), target_body, steps=steps)
    return _beside(source, made, target_body, kind), made


def with_aligned_tokens(
    source: SourceFeatures, target_body: Tensor | None, kind: type[CombinedFeatures] = CombinedFeatures
) -> SourceFeatures:
    """The source in target poses [T, 18, 3] for a model that reads aligned tokens `beside` its own. As it is for any
    other model, for combined sources, without a pose, and where a pose shows too little of a person."""
    if not source.beside or target_body is None:
        return source
    made = source.aligned(target_body)
    return source if made is None else _beside(source, made, target_body, kind)


def _beside(
    source: SourceFeatures, made: AlignedPerson, target_body: Tensor, kind: type[CombinedFeatures]
) -> CombinedFeatures:
    """The source's tokens, and behind them the same as `made` says where they go."""
    times = max(1, len(target_body) // source.batch)
    first = replace(source if times == 1 else _many(source, times), image=None, align=False, beside=False)
    # Bodies that were handed in for these poses are no guess to make again.
    first._rows.update({key: bodies for key, bodies in source._rows.items() if key[0] == "pose"})

    def moved(sites: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: _looked_up(x, first.grid(name), made.grid) for name, x in sites.items()}

    poses = target_body.expand(first.batch, -1, -1).to(first.body)
    surface = source.surface
    if surface is not None:
        surface = replace(surface, body=poses, given=made.target)
    second = replace(
        first,
        sites=moved(first.sites),
        parsing=made.parsing.to(first.parsing.masks.device),
        body=poses,
        surface=surface,
        levels=tuple(Level(level.sigma, moved(level.sites), level.style) for level in first.levels),
        shown=made.own,
    )
    return stacked([first, second], torch.ones(2, len(Region)), first.batch, kind)


def _looked_up(tokens: Tensor, grid: tuple[int, int], where: Tensor) -> Tensor:
    """Tokens [T, M, C] of a grid (rows, columns) at places `where` [T, h, w, 2] in [-1, 1] of their picture."""
    rows, columns = grid
    # The nearest place and not a mean: between two limbs a mean of places is on neither.
    at = interpolate(where.permute(0, 3, 1, 2), (rows, columns), mode="nearest-exact").permute(0, 2, 3, 1)
    maps = tokens.float().transpose(1, 2).unflatten(2, (rows, columns))
    found = grid_sample(maps, at.to(maps), mode="bilinear", padding_mode="border", align_corners=False)
    return found.flatten(2).transpose(1, 2).to(tokens)


def _many(source: SourceFeatures, times: int) -> SourceFeatures:
    """Each of the people `times` times, in a row."""

    def many(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat_interleave(times, 0)

    def level(x: Level) -> Level:
        style = {place: (many(mean), many(deviation)) for place, (mean, deviation) in x.style.items()}
        return Level(x.sigma, {name: many(tokens) for name, tokens in x.sites.items()}, style)

    return replace(
        source,
        sites={name: many(tokens) for name, tokens in source.sites.items()},
        parsing=HumanParsing(many(source.parsing.masks)),
        body=many(source.body),
        caa=None if source.caa is None else source.caa.repeat(times),
        context=many(source.context),
        surface=None if source.surface is None else source.surface.repeated(times),
        levels=tuple(level(x) for x in source.levels),
    )

"""Tokens aligned to the target's pose beside the source's own, inside the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench import apply, close, far, model, reference, sample
from fixtures.tiny import make_conditioning
from pack.nodes.align import AlignSource
from pack.nodes.host import features as host_features
from pack.nodes.host import source as host_source

from truepose_core.errors import TruePoseError
from truepose_core.mannequin import ready_poses, render, sample_identities
from truepose_core.parsing import HumanParsing
from truepose_core.pose import Person, Pose, write_pose
from truepose_core.source.person import SourcePerson

HEIGHT, WIDTH = 96, 64


def shown(name: str) -> object:
    return render(sample_identities([5], 1), ready_poses()[name], HEIGHT, WIDTH)


def keypoints(rendering: object) -> list[dict]:
    return write_pose(Pose(WIDTH, HEIGHT, (Person(rendering.keypoints[0].numpy()),)))


@pytest.fixture(scope="module")
def given() -> tuple[dict[str, object], object]:
    person, target = shown("stand"), shown("wave")
    latent = torch.randn((1, 4, HEIGHT // 8, WIDTH // 8), generator=torch.Generator().manual_seed(1))
    parsing = HumanParsing(person.parsing)
    source = host_source.read_source(model(), latent, parsing, make_conditioning(5), person.keypoints)
    inputs = {
        "image": person.image.movedim(1, -1),
        "parsing": parsing,
        "pose": keypoints(person),
        "target_pose": keypoints(target),
    }
    return inputs, source


def test_they_are_attended_to_as_far_as_they_were_seen(given: tuple) -> None:
    inputs, source = given
    with torch.inference_mode():
        joined = AlignSource.execute(**inputs, source=source).result[3]
    assert isinstance(joined, host_features.CombinedHostFeatures) and joined.parts[0] is source

    def bias(site: str, one: object, count: int) -> torch.Tensor:
        return one.regions(site).sum(-1)[0].clamp(min=1e-30).log().expand(count, -1)

    with reference(model().model.diffusion_model, list(joined.parts), bias):
        expected = sample(model())
    got = sample(apply(model(), joined))
    assert close(got, expected) and far(got, sample(apply(model(), source)))


def test_a_picture_of_odd_sides_is_padded_as_it_was_read(given: tuple) -> None:
    height, width = HEIGHT - 3, WIDTH - 2
    person, target = (
        render(sample_identities([5], 1), ready_poses()[name], height, width) for name in ("stand", "wave")
    )
    read = SourcePerson(person.image, HumanParsing(person.parsing), person.keypoints).padded(8)
    source = replace(given[1], parsing=read.parsing, body=read.body)
    canvas = [write_pose(Pose(width, height, (Person(x.keypoints[0].numpy()),))) for x in (person, target)]
    with torch.inference_mode():
        joined = AlignSource.execute(
            image=person.image.movedim(1, -1),
            parsing=HumanParsing(person.parsing),
            pose=canvas[0],
            target_pose=canvas[1],
            source=source,
        ).result[3]
    assert joined.parts[1].parsing.size == (HEIGHT, WIDTH)


def test_another_picture_is_refused(given: tuple) -> None:
    inputs, source = given
    large = render(sample_identities([5], 1), ready_poses()["stand"], 2 * HEIGHT, 2 * WIDTH)
    other = inputs | {"image": large.image.movedim(1, -1), "parsing": HumanParsing(large.parsing)}
    with pytest.raises(TruePoseError, match="read from a picture of 64x96, and the image here is 128x192"):
        AlignSource.execute(**other, source=source)

"""Align Source: called as the host calls it."""

from __future__ import annotations

import pytest
import torch
from pack.nodes.align import AlignSource

from truepose_core.alignment.recurrent import align_person
from truepose_core.errors import TruePoseError
from truepose_core.evaluation.metrics import area_masks
from truepose_core.mannequin import ready_poses, render, sample_identities
from truepose_core.parsing import HumanParsing
from truepose_core.pose import Person, Pose, write_pose

WIDTH, HEIGHT = 96, 128


def shown(name: str) -> object:
    return render(sample_identities([5], 1), ready_poses()[name], HEIGHT, WIDTH)


def keypoints(rendering: object, width: int = WIDTH) -> list[dict]:
    return write_pose(Pose(width, HEIGHT, (Person(rendering.keypoints[0].numpy()),)))


@pytest.fixture(scope="module")
def inputs() -> dict[str, object]:
    source, target = shown("stand"), shown("wave")
    return {
        "image": source.image.movedim(1, -1),
        "parsing": HumanParsing(source.parsing),
        "pose": keypoints(source),
        "target_pose": keypoints(target),
    }


def test_the_node_gives_what_the_core_gives(inputs: dict) -> None:
    with torch.inference_mode():
        image, seen, parsing, source = AlignSource.execute(**inputs).result
    assert "only where one is connected" in source.message
    source, target = shown("stand"), shown("wave")
    expected = align_person(source.image, HumanParsing(source.parsing), source.keypoints, target.keypoints)
    assert image.shape == (1, HEIGHT, WIDTH, 3) and seen.shape == (1, HEIGHT, WIDTH)
    assert (image.movedim(-1, 1) - expected.picture).abs().max() < 1e-4
    assert (parsing.masks - expected.parsing.masks).abs().max() < 1e-4


def test_it_is_nearer_to_the_truth_than_the_source_is(inputs: dict) -> None:
    image = AlignSource.execute(**inputs).result[0].movedim(-1, 1)
    target = shown("wave")
    person = area_masks(HumanParsing(target.parsing))["foreground"]
    miss = [(x - target.image).square().mean(1)[person].mean() for x in (image, shown("stand").image)]
    assert miss[0] < miss[1] / 4


def test_a_canvas_of_another_shape_is_refused(inputs: dict) -> None:
    wide = keypoints(shown("wave"), width=2 * WIDTH)
    with pytest.raises(TruePoseError, match="192x128"):
        AlignSource.execute(**inputs | {"pose": wide})

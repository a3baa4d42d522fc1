"""The border of `BodyPose`: what is a body, and what is refused."""

import math

import pytest
import torch

import truepose_core.body as body_package
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError


def numbers(count=3, **changes):
    generator = torch.Generator().manual_seed(0)
    made = {
        "theta": 0.5 * torch.randn(count, 24, 3, generator=generator),
        "beta": torch.randn(count, 10, generator=generator),
        "camera": torch.tensor([[0.5, 0.1, -0.2]]).repeat(count, 1),
    }
    return made | changes


def test_a_body_is_stored_as_float32_whatever_it_came_in():
    given = numbers()
    for made in (
        BodyPose(**given),
        BodyPose(**{k: v.double() for k, v in given.items()}),
        BodyPose(**{k: v.numpy() for k, v in given.items()}),
        BodyPose(**{k: v.tolist() for k, v in given.items()}),
    ):
        assert len(made) == 3
        for name, value in given.items():
            assert getattr(made, name).dtype == torch.float32
            assert torch.equal(getattr(made, name), value)


def with_value(name, place, value):
    changed = numbers()[name]
    changed[place] = value
    return {name: changed}


BAD = {
    "22 joints": ({"theta": torch.zeros(3, 22, 3)}, r"theta.*\(3, 22, 3\); expected \[N, 24, 3\]"),
    "matrices": ({"theta": torch.zeros(3, 24, 3, 3)}, r"theta.*\(3, 24, 3, 3\)"),
    "flat": ({"theta": torch.zeros(3, 72)}, r"theta.*\(3, 72\)"),
    "one person without N": ({"theta": torch.zeros(24, 3)}, r"theta.*\(24, 3\)"),
    "16 shapes": ({"beta": torch.zeros(3, 16)}, r"beta.*expected \[N, 10\]"),
    "perspective camera": ({"camera": torch.zeros(3, 4)}, r"camera.*expected \[N, 3\]"),
    "a number": ({"camera": torch.tensor(1.0)}, r"camera.*\(\)"),
    "nobody": (numbers(0), r"theta.*\(0, 24, 3\).*N at least 1"),
    "NaN": (with_value("theta", (1, 4, 2), torch.nan), "theta of a body holds NaN"),
    "infinite": (with_value("beta", (0, 3), torch.inf), "beta of a body holds NaN or infinite"),
    "NaN camera": (with_value("camera", (2, 0), torch.nan), "camera of a body holds NaN"),
    "counts of shapes": ({"beta": torch.zeros(2, 10)}, "3 poses, 2 shapes and 3 cameras"),
    "counts of cameras": ({"camera": torch.ones(1, 3)}, "3 poses, 3 shapes and 1 cameras"),
    "degrees": (with_value("theta", (1, 18, 1), 45.0), r"45\.0 long; expected radians.*pi / 180"),
    "no scale": (with_value("camera", (1, 0), 0.0), "expected a scale above 0"),
    "negative scale": (with_value("camera", (1, 0), -0.5), "scale of -0.5 to 0.5"),
    "scale in pixels": (with_value("camera", (1, 0), 300.0), "to 300 and shifts"),
    "shift in pixels": (with_value("camera", (1, 2), -256.0), "shifts up to 256.*in frame heights"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_body_is_refused_by_name(name):
    changes, message = BAD[name]
    with pytest.raises(TruePoseError, match=message):
        BodyPose(**{**numbers(), **changes})


def test_a_full_turn_is_radians_and_ten_degrees_are_not():
    theta = torch.zeros(1, 24, 3)
    theta[0, 0] = torch.tensor([2 * math.pi, 0.0, 0.0])
    one = numbers(1)
    assert len(BodyPose(theta, one["beta"], one["camera"])) == 1
    theta[0, 0, 0] = 10.0
    with pytest.raises(TruePoseError, match="degrees"):
        BodyPose(theta, one["beta"], one["camera"])


def test_selecting_and_repeating_keep_people_whole():
    body = BodyPose(**numbers())
    chosen = body.select([2, 0, 2])
    for name, value in vars(body).items():
        assert torch.equal(getattr(chosen, name), value[[2, 0, 2]])
        assert torch.equal(getattr(body.repeat(2), name), value[[0, 0, 1, 1, 2, 2]])
        assert torch.equal(getattr(body.to("cpu"), name), value)
    assert torch.equal(body.select(torch.tensor([1])).theta, body.theta[1:2])
    with pytest.raises(TruePoseError, match="N at least 1"):
        body.select(torch.tensor([], dtype=torch.long))


def test_the_package_hands_on_what_costs_nothing():
    assert body_package.__all__ == ["BodyPose"] and body_package.BodyPose is BodyPose

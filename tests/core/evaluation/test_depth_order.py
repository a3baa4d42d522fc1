"""Laws of the depth order's measure: the truth is right, its twin wrong, and keypoints alone are right in half."""

from __future__ import annotations

import json

import pytest
import torch
from small import small_model

from truepose_core.alignment.control3d import Control3DConfig
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.evaluation import depth_order
from truepose_core.evaluation.depth_order import (
    KINDS,
    LEARNED,
    LEAST,
    body_order,
    closer,
    evaluate_depth_order,
    picture_order,
    twin_pairs,
)
from truepose_core.models.store import save_model
from truepose_core.pose.keypoints import FACE_POINTS

SIZE = (64, 48)


@pytest.fixture(scope="module", params=KINDS)
def pairs(request):
    return twin_pairs(request.param, 6, SIZE), request.param


def test_pairs_agree_in_keypoints_and_differ_in_pictures(pairs):
    twins, kind = pairs
    points = [i for i in range(18) if kind == "arm" or i not in FACE_POINTS]
    for shown in (twins.first, twins.second):
        seen = twins.keypoints[:, points, 2:] > 0
        assert torch.allclose(shown.keypoints[:, points] * seen, twins.keypoints[:, points], atol=1e-5)
    assert not twins.keypoints[:, list(FACE_POINTS)].any() or kind == "arm"
    assert torch.equal(twins.first.camera, twins.second.camera)
    assert (twins.disputed.flatten(1).float().mean(1) >= LEAST).all()
    assert len(twins) == len(twins.index.unique()) == 6
    more = twin_pairs(kind, 8, SIZE)
    assert torch.equal(more.index[:6], twins.index) and torch.equal(more.disputed[:6], twins.disputed)


def test_the_truth_is_right_and_its_twin_wrong(pairs):
    twins, _ = pairs

    def truth(pairs, body: BodyPose | None):
        return pairs.first.image if torch.equal(body.theta, pairs.first.theta) else pairs.second.image

    def shares(draw, given=True):
        return list(picture_order(twins, draw, given).shares().values())

    assert shares(truth) == [1, 1, 1, 1]
    assert shares(lambda p, b: truth(p, swapped(p, b))) == [0, 0, 0, 0]
    assert shares(lambda p, b: p.first.image, False) == [1, 0, 0.5, 0.5]
    # Nearer to one truth throughout, and yet moved in the right way.
    assert shares(lambda p, b: 0.8 * p.first.image + 0.2 * truth(p, b)) == [1, 0, 0.5, 1]


def swapped(pairs, body: BodyPose) -> BodyPose:
    other = pairs.second if torch.equal(body.theta, pairs.first.theta) else pairs.first
    return BodyPose(other.theta, other.beta, other.camera)


def test_a_given_body_is_right_and_a_lifted_one_in_half(pairs):
    twins, _ = pairs
    given, lifted = body_order(twins, True).shares(), body_order(twins, False).shares()
    assert given["both"] > 0.9 and given["told apart"] == 1
    assert lifted["both"] == lifted["told apart"] == 0.5


def test_a_tie_is_half():
    a, b = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    where = torch.ones(1, 2, 2, dtype=torch.bool)
    assert closer(a, a, b, where) == 1 and closer(b, a, b, where) == 0 and closer((a + b) / 2, a, b, where) == 0.5
    assert closer(b, a, b, ~where) == 0.5


def test_the_report(tmp_path, monkeypatch):
    models = {}
    for name, config in (
        ("depth-base", None),
        ("depth-decoupled", Control3DConfig(query="source", scale=0.5)),
        ("depth-2d", Control3DConfig(query="keypoints", scale=0.5)),
        ("depth-3d", Control3DConfig(scale=0.5)),
        ("depth-3d-found", Control3DConfig(keep_query=False, scale=0.5)),
    ):
        models[name] = save_model(small_model("concat", caa=False, control3d=config), tmp_path / f"{name}.safetensors")
    report = evaluate_depth_order(4, steps=1, models=models)
    rows = json.loads(report.to_json())["rows"]
    assert set(rows) == set(KINDS)
    for kind in KINDS:
        assert set(rows[kind]) == {*LEARNED, "body lifted, drawn", "body given, drawn"}
        for row in ("concatenation", "decoupled attention", "2D prior", "3D guidance, lifted", "body lifted, drawn"):
            assert rows[kind][row]["both"] == rows[kind][row]["told apart"] == 0.5
    assert "right order in front" in report.markdown() and "| 2D prior |" in report.markdown()
    with pytest.raises(TruePoseError, match="unknown model 'mine'"):
        evaluate_depth_order(4, models={"mine": models["depth-3d"]})
    with pytest.raises(TruePoseError, match="0 pairs"):
        twin_pairs("arm", 0, SIZE)
    with pytest.raises(TruePoseError, match="kind is 'leg'"):
        twin_pairs("leg", 2, SIZE)
    monkeypatch.setattr(depth_order, "_MOST", 1)
    with pytest.raises(TruePoseError, match="ask for fewer pairs"):
        twin_pairs("arm", 1000, SIZE)

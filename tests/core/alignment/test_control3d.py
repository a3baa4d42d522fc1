"""Laws of relative depth guidance: what it reads, what it leaves alone, and what its numbers mean."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from small import people, small_model, source_of

from truepose_core.alignment.control3d import (
    PLACE_REACH,
    BodyQuery,
    Control3D,
    Control3DConfig,
    body_numbers,
    body_places,
    cells,
    fourier,
    framed_body,
    human_prior_loss,
    keypoint_places,
    place_bias,
    target_bodies,
)
from truepose_core.body.lift import six_of_rotation
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import fit
from truepose_core.mannequin.body import axis_angle_to_matrix
from truepose_core.mannequin.twins import hide_faces, mirror_body
from truepose_core.models.beside import middle_site
from truepose_core.models.config import TruePoseConfig, mannequin_config
from truepose_core.models.store import load_model, save_model
from truepose_core.parsing import HumanParsing
from truepose_core.pipeline import TruePosePipeline
from truepose_core.weights.strict import bundled_path, read_metadata

SIZE = (16, 12)
QUERIES = [
    Control3DConfig(query="source", scale=0.7),
    Control3DConfig(query="keypoints", scale=0.7),
    Control3DConfig(scale=0.7),
    Control3DConfig(keep_query=False, scale=0.7),
]
KEPT = [config for config in QUERIES if config.query != "source" and config.keep_query]
PAIRS = people(3)
TIMES = torch.tensor([100, 400, 900])


def bodies(shown=PAIRS.target) -> BodyPose:
    return BodyPose(shown.theta, shown.beta, shown.camera)


def model_with(config: Control3DConfig, **changes):
    return small_model("concat", caa=False, control3d=config, **changes)


def noise() -> torch.Tensor:
    return torch.randn(3, 48, *SIZE, generator=torch.Generator().manual_seed(0))


def denoised(model, tokens, rows=slice(None)):
    source = model.encode_source(*source_of(PAIRS, rows))
    call = replace(model.target_pass(SIZE, source, PAIRS.target.keypoints[rows]), control=tokens)
    return model.denoise(noise()[rows], TIMES[rows], call, None)


def tokens_of(model, rows=slice(None), **more):
    source = model.encode_source(*source_of(PAIRS, rows))
    pose = bodies(PAIRS.target.select(torch.arange(3)[rows]))
    return model.control_tokens(source, PAIRS.target.keypoints[rows], SIZE, pose, **more)


@pytest.mark.parametrize("reach", [1.0, PLACE_REACH])
def test_the_fourier_embedding_tells_all_numbers_apart_within_its_reach(reach):
    x = torch.linspace(-reach, reach, 2001, dtype=torch.float64)[:, None]
    made = fourier(x, 6, reach)
    assert made.shape == (2001, 12) and torch.equal(fourier(2 * x, 6, reach)[0], made[0])
    apart = torch.cdist(made, made) + 10 * torch.eye(2001)
    assert apart.min() > 1e-3
    assert (made[1:, 0] > made[:-1, 0]).all()
    assert torch.allclose(made[:, 7], (math.pi * x[:, 0] / reach).cos())


def test_twins_differ_in_what_the_body_says_and_not_in_what_keypoints_say():
    one = bodies()
    other = BodyPose(mirror_body(one.theta), one.beta, one.camera)
    assert (body_numbers(one, 4)[0] - body_numbers(other, 4)[0]).abs().amax((1, 2)).min() > 0.1
    feet = [j for j in range(24) if j not in (10, 11)]
    assert torch.allclose(body_places(one)[:, feet], body_places(other)[:, feet], atol=1e-5)


def test_joints_are_where_the_pictures_keypoints_are():
    shown = PAIRS.target
    joints = body_places(bodies())[:, [17, 19, 21, 16, 18, 20, 2, 5, 8, 1, 4, 7]]
    points = keypoint_places(shown.keypoints, 0.75)[:, 2:14]
    seen = points[..., 2] > 0
    assert torch.allclose(joints[seen], points[seen], atol=1e-5)
    whole = body_places(bodies())[:, 24]
    assert not whole.any()


def test_a_place_prefers_the_joints_near_to_it():
    grid = cells(4, 3, torch.zeros(()))
    assert torch.allclose(grid[0], torch.tensor([-0.25, -0.375])) and torch.allclose(grid.mean(0), torch.zeros(2))
    places = torch.cat([torch.cat([grid, torch.ones(12, 1)], 1), torch.zeros(1, 3)])[None]
    bias = place_bias(grid, places, torch.tensor([100.0, 25.0]))
    assert bias.shape == (1, 2, 12, 13)
    assert torch.equal(bias[0, 0, :, :12].argmax(1), torch.arange(12)) and (bias[0, 0].diagonal() == 0).all()
    assert torch.allclose(bias[0, 0], 4 * bias[0, 1])
    assert torch.allclose(bias[..., 12], torch.tensor([-2.0, -0.5])[None, :, None])


def test_the_human_prior_loss_is_zero_for_the_truth_and_a_norm():
    truth = bodies()
    six = six_of_rotation(axis_angle_to_matrix(truth.theta))
    assert human_prior_loss((six, truth.beta), truth) < 1e-5
    # What is regressed becomes a rotation first: a longer pair of columns is the same one.
    assert human_prior_loss((3 * six, truth.beta), truth) < 1e-5
    off = torch.zeros(3, 10)
    off[:, 0], off[:, 1] = 3, 4
    assert human_prior_loss((six, truth.beta + off), truth).item() == pytest.approx(5, abs=1e-4)
    turned = replace_root(truth, 180.0)
    expected = (six_of_rotation(axis_angle_to_matrix(turned.theta)) - six).flatten(1).norm(dim=1).mean()
    assert human_prior_loss((six, truth.beta), turned).item() == pytest.approx(expected.item(), rel=1e-4)


def replace_root(body: BodyPose, degrees: float) -> BodyPose:
    theta = body.theta.clone()
    theta[:, 0] = torch.tensor([0.0, math.radians(degrees), 0.0])
    return BodyPose(theta, body.beta, body.camera)


@pytest.mark.parametrize("config", QUERIES)
def test_lambda_zero_is_the_model_without_it(config):
    guided = model_with(config)
    plain = small_model("concat", caa=False)
    plain.load_state_dict({k: v for k, v in guided.state_dict().items() if not k.startswith("control3d.")})
    tokens = tokens_of(guided)
    with torch.no_grad():
        changed = denoised(guided, tokens)
        for site in guided.control3d.target_sites.values():
            site.scale.zero_()
        assert torch.equal(denoised(guided, tokens), denoised(plain, None))
    assert (changed - denoised(plain, None)).abs().max() > 1e-3
    assert tokens_of(guided, strength=0.0) is None


@pytest.mark.parametrize("config", QUERIES)
def test_the_order_of_the_sources_tokens_is_nothing(config):
    torch.manual_seed(0)
    control = Control3D(config, 32, {"site": (32, 4)})
    features, order = torch.randn(3, 20, 32), torch.randperm(20)
    asked = control.ask(PAIRS.target.keypoints, 0.75, bodies())
    weights = torch.rand(3, 20)
    q = torch.randn(3, 4, 192, 8)

    def out(features, weights):
        return control.target_sites["site"](q, control.tokens(features, asked, weights=weights), SIZE)

    assert torch.allclose(out(features, weights), out(features[:, order], weights[:, order]), atol=1e-5)
    assert not torch.allclose(out(features, weights), out(features[:, order], weights), atol=1e-3)
    regressed = control.regress(features)
    if config.query == "body":
        again = control.regress(features[:, order])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(regressed, again, strict=True))
    else:
        assert regressed is None


@pytest.mark.parametrize("config", QUERIES)
def test_tokens_of_weight_zero_are_not_read(config):
    torch.manual_seed(0)
    control = Control3D(config, 32, {"site": (32, 4)})
    features, weights = torch.randn(3, 20, 32), torch.ones(3, 20)
    weights[:, 12:] = 0
    asked = control.ask(PAIRS.target.keypoints, 0.75, bodies())
    q = torch.randn(3, 4, 192, 8)
    site = control.target_sites["site"]
    dropped = site(q, control.tokens(features[:, :12], asked), SIZE)
    assert torch.allclose(site(q, control.tokens(features, asked, weights=weights), SIZE), dropped, atol=1e-5)


@pytest.mark.parametrize("config", QUERIES)
def test_a_batch_equals_its_items(config):
    model = model_with(config)
    together = denoised(model, tokens_of(model))
    for i in range(3):
        row = slice(i, i + 1)
        assert torch.allclose(together[row], denoised(model, tokens_of(model, row), row), atol=1e-5)


@pytest.mark.parametrize("config", QUERIES)
def test_several_targets_of_one_source_are_it_several_times(config):
    torch.manual_seed(0)
    control = Control3D(config, 32, {"site": (32, 4)})
    features = torch.randn(1, 20, 32)
    asked = control.ask(PAIRS.target.keypoints, 0.75, bodies())
    keep = torch.ones(3, dtype=torch.bool)
    shared, each = control.tokens(features, asked, keep), control.tokens(features.expand(3, -1, -1), asked, keep)
    assert torch.equal(shared.tokens, each.tokens)


@pytest.mark.parametrize("config", QUERIES)
def test_conditions_are_dropped_as_guidance_separates_them(config):
    """Rows without the source are what the pose alone says, rows without the pose are nothing."""
    model = model_with(config)
    keep_source, keep_pose = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    mixed = denoised(model, tokens_of(model, keep_source=keep_source, keep_pose=keep_pose))
    posed = model.control_tokens(None, PAIRS.target.keypoints, SIZE, bodies())
    assert (posed is None) == (config not in KEPT)
    for row, expected in enumerate((denoised(model, tokens_of(model)), denoised(model, posed), denoised(model, None))):
        assert torch.allclose(mixed[row], expected[row], atol=1e-5)


def test_a_training_pass_gives_the_sources_body_and_its_gradient_reaches_the_source_net():
    model = model_with(Control3DConfig(scale=0.7)).requires_grad_(True)
    keep = torch.ones(3, dtype=torch.bool)
    prediction, _, regressed = model(
        *source_of(PAIRS), noise(), TIMES, torch.zeros(3, 3, 64, 48), PAIRS.target.keypoints, keep, keep, bodies()
    )
    assert prediction.shape == (3, 48, *SIZE)
    human_prior_loss(regressed, bodies(PAIRS.source)).backward()
    assert model.source_net.conv_in.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in model.target_net.parameters())


def test_old_files_load_and_have_no_guidance(tmp_path):
    for name in ("mannequin", "row-concat"):
        path = bundled_path(name)
        old = json.loads(read_metadata(path)["config"])
        del old["control3d"], old["aligned_by"]
        assert TruePoseConfig.from_json(json.dumps(old)).control3d is None
        assert load_model(path).control3d is None
    config = replace(mannequin_config(), control3d=Control3DConfig(query="keypoints", width=32))
    assert TruePoseConfig.from_json(config.to_json()).control3d == config.control3d
    made = model_with(Control3DConfig(width=32))
    path = save_model(made, tmp_path / "model.safetensors")
    again = load_model(path)
    assert again.config.control3d == made.config.control3d
    assert torch.equal(denoised(again, tokens_of(again)), denoised(made, tokens_of(made)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(TruePoseError, match="query is 'depth'; expected one of source, keypoints, body"):
        Control3DConfig(query="depth")
    with pytest.raises(TruePoseError, match="fusion must not be 'none'"):
        replace(mannequin_config("none", caa=False), control3d=Control3DConfig())
    with pytest.raises(TruePoseError, match="middle block"):
        middle_site(["down_blocks.0"])
    with pytest.raises(TruePoseError, match="reads the target's body, and none was given"):
        Control3D(Control3DConfig(), 32, {"site": (32, 4)}).ask(PAIRS.target.keypoints, 0.75, None)


def test_a_body_in_the_models_canvas_is_where_its_keypoints_are():
    """A wide picture is padded above and below; joints must move as keypoints do."""
    frame = fit((60, 90), (64, 48))
    one = bodies()
    points = keypoint_places(PAIRS.target.keypoints, 0.75)
    wide = torch.cat([points[..., :1] / 1.5 + 0.5, points[..., 1:2] + 0.5, points[..., 2:]], -1)
    moved = keypoint_places(frame.apply_keypoints(wide), 0.75)
    joints = [17, 19, 21, 16, 18, 20, 2, 5, 8, 1, 4, 7]
    seen = points[:, 2:14, 2] > 0
    assert torch.allclose(body_places(framed_body(one, frame))[:, joints][seen], moved[:, 2:14][seen], atol=1e-5)
    depth = [body_numbers(framed_body(one, frame), 1)[0], body_numbers(one, 1)[0]]
    assert not torch.allclose(*depth)


def test_targets_take_their_sources_shape():
    keypoints, aspect = PAIRS.target.keypoints, 0.75
    given = bodies()
    assert target_bodies(keypoints, aspect, given=given).theta is not None
    assert torch.equal(target_bodies(keypoints, aspect, given=given.select([1])).theta, given.theta[[1, 1, 1]])
    known = target_bodies(keypoints, aspect, source=bodies(PAIRS.source))
    assert torch.allclose(known.beta, PAIRS.source.beta, atol=1e-5)
    both = target_bodies(keypoints[:2], aspect, PAIRS.source.keypoints[:1])
    assert torch.equal(both.beta[0], both.beta[1])
    unseen = target_bodies(keypoints, aspect, PAIRS.source.keypoints * 0)
    assert torch.equal(unseen.theta, target_bodies(keypoints, aspect).theta)
    with pytest.raises(TruePoseError, match="2 target bodies and 3 target poses"):
        target_bodies(keypoints, aspect, given=given.select([0, 1]))
    with pytest.raises(TruePoseError, match="visible body keypoints"):
        target_bodies(keypoints * 0, aspect)


def test_the_pipeline_reads_a_given_body_and_lifts_it_otherwise():
    model = model_with(Control3DConfig(scale=0.7))
    pipe = TruePosePipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    image, parsing, body = source_of(PAIRS)
    target = hide_faces(PAIRS.target.keypoints, torch.ones(3, dtype=torch.bool))

    def made(**more):
        return pipe(image, target, parsing, body, num_inference_steps=2, seed=0, **more).images

    one = bodies()
    other = BodyPose(mirror_body(one.theta), one.beta, one.camera)
    assert torch.equal(made(), made())
    assert (made(target_pose=one) - made(target_pose=other)).abs().max() > 1e-3
    lifted = target_bodies(target, 0.75, body)
    assert torch.allclose(made(target_pose=lifted), made(), atol=1e-5)
    plain = TruePosePipeline.from_model(small_model("concat", caa=False))
    plain.model.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("control3d.")})
    plain.set_progress_bar_config(disable=True)
    without = plain(image, target, parsing, body, num_inference_steps=2, seed=0).images
    assert torch.equal(made(control_strength=0.0), without)
    with pytest.raises(TruePoseError, match="reads no bodies"):
        plain(image, target, parsing, body, target_pose=one)
    with pytest.raises(TruePoseError, match="control_strength is -1"):
        made(control_strength=-1)


@pytest.mark.parametrize("scales", [(2.0, 3.0), (1.5, 0.0)])
def test_guidance_separates_pose_and_source(scales):
    """e_pose reads the body and nothing of the source."""
    model = model_with(Control3DConfig(scale=0.7))
    pipe = TruePosePipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    image, parsing, body = source_of(PAIRS)
    pose, source = scales
    given = dict(num_inference_steps=1, seed=0, target_pose=bodies(), guidance_pose=pose, guidance_source=source)
    one = pipe(image, PAIRS.target.keypoints, parsing, body, **given).images
    other = pipe(
        image.flip(0), PAIRS.target.keypoints, HumanParsing(parsing.masks.flip(0)), body.flip(0), **given
    ).images
    same = torch.allclose(one, other, atol=1e-5)
    assert same == (source == 0)


def test_tokens_of_a_body_carry_every_joint():
    torch.manual_seed(0)
    query, one = BodyQuery(32, 6), bodies()
    made = query(one)
    assert made.shape == (3, 25, 32)
    theta = one.theta.clone()
    theta[:, 20] += 0.4
    moved = (query(BodyPose(theta, one.beta, one.camera)) - made).abs().amax((0, 2)) > 1e-5
    # A wrist turns itself and the hand below it.
    assert moved.nonzero().flatten().tolist() == [20, 22]

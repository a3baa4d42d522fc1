"""A model on top of recurrent alignment: what starts as what, what is prepared, and what bodies it goes by."""

from dataclasses import replace

import pytest
import torch

from truepose_core.alignment.recurrent import align_person
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import sample_pairs
from truepose_core.models.config import TruePoseConfig, large_config
from truepose_core.models.model import TruePoseModel
from truepose_core.parsing import HumanParsing
from truepose_core.pipeline import TruePosePipeline
from truepose_core.source.combine import combine_sources
from truepose_core.training.data import MannequinPool

SIZE = (128, 96)


def small_aligned(**more) -> TruePoseModel:
    torch.manual_seed(0)
    return TruePoseModel(replace(large_config("hpfa", False, (16,), aligned=True), **more)).eval()


@pytest.fixture(scope="module")
def pairs():
    return sample_pairs([0, 1], "test", height=SIZE[0], width=SIZE[1])


@pytest.fixture(scope="module")
def model():
    return small_aligned()


@pytest.fixture(scope="module")
def features(model, pairs):
    source = pairs.source
    with torch.no_grad():
        return model.encode_source(source.image, HumanParsing(source.parsing), source.keypoints)


def test_the_untrained_model_paints_what_alignment_makes(model, pairs):
    source = pairs.source
    parsing = HumanParsing(source.parsing)
    pipe = TruePosePipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    for steps in (1, 3):
        made = pipe(
            source.image, pairs.target.keypoints, parsing, source.keypoints, num_inference_steps=steps, seed=0
        ).images
        aligned = align_person(source.image, parsing, source.keypoints, pairs.target.keypoints)
        assert torch.allclose(made, aligned.picture, atol=1e-5)


def test_prior_and_carried_come_from_alignment(features, pairs):
    source, target = pairs.source, pairs.target.keypoints
    aligned = align_person(source.image, HumanParsing(source.parsing), source.keypoints, target)
    picture, certain = features.carried(target)
    assert torch.allclose(picture, aligned.picture, atol=1e-6)
    assert torch.allclose(certain, aligned.seen, atol=1e-6)
    assert torch.allclose(features.prior(target, *SIZE).masks, aligned.parsing.masks, atol=1e-5)
    coarse = features.prior(target, 16, 12).masks
    assert torch.allclose(coarse.sum(1), torch.ones(2, 16, 12), atol=1e-5)
    # Made once, and found again elsewhere.
    assert features.aligned(target) is features.aligned(target.clone())
    assert features.to("cpu").aligned(target) is features.aligned(target)


def test_region_weights_act_on_what_is_carried(features, pairs):
    target = pairs.target.keypoints
    picture, certain = features.carried(target)
    same, sure = features.carried(target, torch.ones(7))
    assert torch.allclose(same, picture, atol=1e-6) and torch.allclose(sure, certain, atol=1e-6)
    none, unsure = features.carried(target, torch.zeros(7))
    assert torch.equal(none, torch.full_like(none, 0.5)) and not unsure.any()
    half, _ = features.carried(target, torch.full((7,), 0.5))
    assert torch.allclose(half - 0.5, (picture - 0.5) / 2, atol=1e-6)


def test_one_pose_serves_all_sources(features, pairs):
    target = pairs.target.keypoints
    picture, _ = features.carried(target[:1])
    assert torch.allclose(picture[0], features.carried(target[[0, 0]])[0][0], atol=1e-6)
    assert len(picture) == 2


def test_combined_sources_are_carried_region_by_region(model, pairs):
    source, target = pairs.source, pairs.target.keypoints[:1]
    with torch.no_grad():
        one, two = (
            model.encode_source(source.image[i : i + 1], HumanParsing(source.parsing[i : i + 1]), source.keypoints[:1])
            for i in (0, 1)
        )
    upper = torch.zeros(7)
    upper[3] = 1
    combined = combine_sources(one, two, upper)
    picture, _ = combined.carried(target)
    mine, theirs = one.carried(target)[0], two.carried(target)[0]
    face = (one.prior(target, *SIZE).masks[:, 1:2] > 0.99) & (two.prior(target, *SIZE).masks[:, 3:4] < 0.01)
    top = two.prior(target, *SIZE).masks[:, 3:4] > 0.999
    assert face.any() and top.any()
    assert ((picture - mine).abs() * face).max() < 0.03
    assert ((picture - theirs).abs() * top).max() < 0.03


def test_a_pose_of_too_few_points_goes_by_the_skeleton(features, pairs, caplog):
    few = pairs.target.keypoints.clone()
    few[:, 4:, 2] = 0
    assert features.aligned(few) is None
    assert features.carried(few)[0].shape == (2, 3, *SIZE)
    assert "visible body keypoints" in caplog.text


def test_bodies_that_are_given_are_taken(model, pairs):
    source, target = pairs.source, pairs.target
    pipe = TruePosePipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    first, second = (BodyPose(x.theta, x.beta, x.camera) for x in (source, target))

    def made(who=pipe, **more):
        how = {"num_inference_steps": 1, "seed": 0, **more}
        return who(source.image, target.keypoints, HumanParsing(source.parsing), source.keypoints, **how).images

    given = made(source_pose=first, target_pose=second)
    assert (given - made()).abs().mean() > 1e-3
    features = pipe.encode_source(source.image, HumanParsing(source.parsing), source.keypoints, source_pose=first)
    lifted = features.bodies_in(target.keypoints, 0.75)
    again = pipe(features, target.keypoints, height=SIZE[0], width=SIZE[1], num_inference_steps=1, seed=0).images
    assert torch.allclose(made(source_pose=first, target_pose=lifted), again, atol=1e-5)
    # What is given holds for one call.
    how = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 1, "seed": 0}
    pipe(features, target.keypoints, target_pose=second, **how)
    assert torch.equal(pipe(features, target.keypoints, **how).images, again)
    plain = TruePosePipeline.from_model(small_aligned(aligned=False, match="skeleton"))
    with pytest.raises(TruePoseError, match="reads no bodies"):
        made(plain, target_pose=second)


def test_what_the_pool_prepares_is_what_a_batch_would_make(model):
    pool = MannequinPool(2, 3, SIZE, seed=1, fresh=1, first_source=True, prepare="alignment")
    batch = pool.batch(2, 2)
    with torch.no_grad():
        source = model.encode_source(batch.source_image, batch.source_parsing, batch.source_body)
        assert torch.allclose(source.surface.bodies.theta, batch.lifted[0].theta[::2], atol=1e-4)
        assert torch.allclose(source.bodies_in(batch.target_body, 0.75).theta, batch.lifted[1].theta, atol=1e-4)
        aligned = source.aligned(batch.target_body)
    # Prepared from pictures of 8 bits, and kept in 8 bits.
    assert (aligned.picture - batch.aligned.picture).abs().max() < 0.02
    assert (aligned.seen - batch.aligned.seen).abs().max() < 0.02
    noisy, rows = torch.randn(4, 48, 32, 24), torch.ones(4, dtype=torch.bool)
    common = (batch.source_image, batch.source_parsing, batch.source_body, noisy, torch.full((4,), 500))
    common = (*common, torch.zeros(4, 3, *SIZE), batch.target_body, rows, rows, None)
    with torch.no_grad():
        ready = model(*common, batch.lifted, batch.aligned)[0]
        anew = model(*common)[0]
    assert (ready - anew).abs().max() < 0.05


def test_the_pool_at_a_step_depends_on_the_step_alone():
    how = {"seed": 1, "fresh": 1, "first_source": True, "prepare": "alignment"}
    walked = MannequinPool(2, 2, SIZE, **how)
    walked.advance()
    there = MannequinPool(2, 2, SIZE, step=1, **how)
    for name, value in walked.aligned.items():
        assert torch.equal(value[:, 1:], there.aligned[name][:, 1:])
    assert torch.equal(walked.batch(2, 1).source_image, there.batch(2, 1).source_image)


def test_choices_that_do_not_fit_together():
    with pytest.raises(TruePoseError, match="match must be 'surface'"):
        small_aligned(match="skeleton")
    with pytest.raises(TruePoseError, match="aligned_by is 'magic'"):
        small_aligned(aligned_by="magic")
    with pytest.raises(TruePoseError, match="first pose"):
        MannequinPool(2, 2, SIZE, prepare="alignment")
    config = large_config("hpfa", True, aligned=True)
    assert TruePoseConfig.from_json(config.to_json()).to_json() == config.to_json()


@pytest.mark.parametrize("size", [(256, 192), (200, 100)])
def test_larger_pictures_are_composed_of_the_source_at_its_own_size(model, size):
    pairs = sample_pairs([0], "test", height=size[0], width=size[1])
    source, target = pairs.source, pairs.target.keypoints
    pipe = TruePosePipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    parsing = HumanParsing(source.parsing)

    def made(**more):
        return pipe(source.image, target, parsing, source.keypoints, num_inference_steps=1, seed=0, **more).images

    # An untrained model adds nothing to what alignment makes, at any size.
    aligned = align_person(source.image, parsing, source.keypoints, target).picture
    assert torch.allclose(made(), aligned, atol=1e-4)
    half = torch.full((7,), 0.5)
    assert torch.allclose(made(region_weights=half) - 0.5, (aligned - 0.5) / 2, atol=0.02)

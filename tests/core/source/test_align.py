"""Tokens of a source brought to another pose, beside its own."""

from dataclasses import replace

import pytest
import torch

from truepose_core.alignment.recurrent import align_person
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import sample_pairs
from truepose_core.models.config import large_config
from truepose_core.models.model import TruePoseModel
from truepose_core.parsing import HumanParsing
from truepose_core.pipeline import TruePosePipeline
from truepose_core.source.align import align_source, with_aligned_tokens
from truepose_core.source.features import SourceFeatures


@pytest.fixture(scope="module")
def pairs():
    return sample_pairs([0, 1], "test", height=128, width=96)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TruePoseModel(large_config("hpfa", False, (16, 32))).eval()


@pytest.fixture(scope="module")
def source(model, pairs):
    with torch.no_grad():
        return model.encode_source(pairs.source.image, HumanParsing(pairs.source.parsing), pairs.source.keypoints)


def test_tokens_that_are_pixels_become_the_aligned_picture():
    """Where a token is its own pixels, what is looked up is what alignment carries."""
    pairs = sample_pairs([2, 5], "test", height=128, width=96)
    image, masks = pairs.source.image, pairs.source.parsing
    tokens = torch.nn.functional.avg_pool2d(image, 4).flatten(2).transpose(1, 2)
    features = SourceFeatures("test", {"only": tokens}, (32, 24), HumanParsing(masks), pairs.source.keypoints)
    joined, made = align_source(features, image, pairs.target.keypoints)
    assert torch.equal(joined.sites["only"][:, :768], tokens)
    own = torch.nn.functional.avg_pool2d(made.own, 4).flatten(1) > 0.5
    found = joined.sites["only"][:, 768:]
    shown = torch.nn.functional.avg_pool2d(made.picture, 4).flatten(2).transpose(1, 2)
    assert own.sum() > 100
    # Alignment also corrects the light, which tokens do not get.
    assert (found - shown).abs().mean(-1)[own].mean() < 0.08
    assert (tokens - shown).abs().mean(-1)[own].mean() > 0.12


def test_aligned_tokens_have_the_targets_regions_and_count_as_they_were_seen(source, pairs):
    joined, made = align_source(source, pairs.source.image, pairs.target.keypoints)
    aligned = align_person(pairs.source.image, source.parsing, source.body, pairs.target.keypoints)
    assert torch.allclose(made.picture, aligned.picture)
    site = next(iter(source.sites))
    h, w = source.grid(site)
    rows, count = joined.regions(site), h * w
    assert torch.equal(rows[:, :count], source.regions(site))
    seen = torch.nn.functional.adaptive_avg_pool2d(made.own, (h, w)).flatten(1)
    assert torch.allclose(rows[:, count:].sum(-1), seen, atol=1e-5)
    assert torch.allclose(rows[:, count:], made.parsing.tokens(h, w) * seen[..., None], atol=1e-6)
    assert torch.allclose(joined.token_weights(site, None)[:, :count], torch.ones(2, count), atol=1e-5)
    # They stand where the target stands.
    places = joined.coordinates(site)[:, count:]
    wanted = source.surface.tokens(made.target, h, w, 0.75)
    assert torch.allclose(places, wanted, atol=1e-5)


def test_tokens_of_which_nothing_was_seen_change_nothing(model, source, pairs):
    pipe = TruePosePipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    target = pairs.target.keypoints

    def made(features):
        return pipe(features, target, height=128, width=96, num_inference_steps=1, seed=0).images

    joined, _ = align_source(source, pairs.source.image, target)
    nothing = replace(joined.parts[1], shown=torch.zeros_like(joined.parts[1].shown))
    unseen = replace(joined, parts=(joined.parts[0], nothing))
    plain = made(source)
    assert (made(joined) - plain).abs().max() > 1e-3
    # The prior is painted by both parts; without it nothing is left of the second.
    parsing = HumanParsing(pairs.target.parsing)

    def told(features):
        return pipe(
            features, target, height=128, width=96, num_inference_steps=1, seed=0, target_parsing=parsing
        ).images

    assert torch.allclose(told(unseen), told(source), atol=1e-5)


def twin(model):
    """The same weights, in a model that reads aligned tokens by itself."""
    other = TruePoseModel(replace(model.config, aligned_tokens=True)).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_a_model_trained_so_aligns_by_itself(model, source, pairs):
    joined, _ = align_source(source, pairs.source.image, pairs.target.keypoints)
    pictures = []
    for net, given in ((model, joined), (twin(model), pairs.source.image)):
        pipe = TruePosePipeline.from_model(net)
        pipe.set_progress_bar_config(disable=True)
        more = {}
        if given is pairs.source.image:
            more = {"source_parsing": source.parsing, "source_body": source.body}
        made = pipe(given, pairs.target.keypoints, height=128, width=96, num_inference_steps=1, seed=0, **more)
        pictures.append(made.images)
    assert torch.allclose(*pictures, atol=1e-5)


def test_aligned_tokens_are_trained_through(model, pairs):
    """A gradient reaches SourceNet also where the target reads nothing but aligned tokens."""
    net = twin(model)
    own = net.encode_source(pairs.source.image, HumanParsing(pairs.source.parsing), pairs.source.keypoints)
    joined = with_aligned_tokens(own, pairs.target.keypoints)
    count = next(iter(own.sites.values())).shape[1]
    next(iter(joined.sites.values()))[:, count:].square().sum().backward()
    assert net.source_net.conv_in.weight.grad.abs().sum() > 0
    assert with_aligned_tokens(own, None) is own and with_aligned_tokens(joined, pairs.target.keypoints) is joined


def test_settings_that_cannot_hold_aligned_tokens(model):
    for wrong in ({"match": "skeleton"}, {"fusion": "none"}):
        with pytest.raises(TruePoseError, match="aligned tokens stand beside"):
            replace(model.config, aligned_tokens=True, **wrong)


def test_one_source_in_several_poses(model, pairs):
    with torch.no_grad():
        one = model.encode_source(
            pairs.source.image[:1], HumanParsing(pairs.source.parsing[:1]), pairs.source.keypoints[:1]
        )
    joined, made = align_source(one, pairs.source.image[:1], pairs.target.keypoints)
    assert joined.batch == 2 and len(made.picture) == 2
    alone, _ = align_source(one, pairs.source.image[:1], pairs.target.keypoints[1:])
    for site, tokens in joined.sites.items():
        assert torch.allclose(tokens[1:], alone.sites[site], atol=1e-4)


def test_what_cannot_be_aligned(source, pairs):
    target, image = pairs.target.keypoints, pairs.source.image
    with pytest.raises(TruePoseError, match="read without its pose"):
        align_source(replace(source, body=None), image, target)
    with pytest.raises(TruePoseError, match="read from 2 pictures of 96x128, and 1 of 96x128 are given"):
        align_source(source, image[:1], target)
    with pytest.raises(TruePoseError, match="aligns its source to the target pose by itself"):
        align_source(replace(source, image=image), image, target)
    joined, _ = align_source(source, image, target)
    with pytest.raises(TruePoseError, match="only a single source"):
        align_source(joined, image, target)

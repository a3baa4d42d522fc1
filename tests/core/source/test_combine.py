"""Laws of combined sources."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import people, small_model, source_of

from truepose_core.body.places import SurfacePlaces
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.pipeline import TruePosePipeline
from truepose_core.regions import REGION_NAMES, Region
from truepose_core.source.combine import CombinedFeatures, combine_sources


def encoded(model, row):
    image, parsing, body = source_of(people(), slice(row, row + 1))
    return model.encode_source(image, parsing, body)


@pytest.fixture(scope="module")
def model():
    return small_model(aligned=True)


@pytest.fixture(scope="module")
def both(model):
    return encoded(model, 0), encoded(model, 1)


def only(*names):
    return torch.tensor([float(name in names) for name in REGION_NAMES])


def test_no_share_is_the_source_and_all_shares_are_the_donor(both):
    source, donor = both
    assert combine_sources(source, donor, [0.0] * 7) is source
    assert combine_sources(source, donor, [1.0] * 7) is donor


def test_tokens_are_weighed_by_the_part_they_come_from(both):
    source, donor = both
    shares = torch.tensor([0.0, 0.25, 0, 1, 0, 0, 0.5])
    omega = torch.tensor([1.0, 0.5, 1, 1, 0, 1, 1])
    combined = combine_sources(source, donor, shares)
    for site in source.sites:
        expected = torch.cat(
            [
                (source.regions(site) * (1 - shares) * omega).sum(-1),
                (donor.regions(site) * shares * omega).sum(-1),
            ],
            1,
        )
        torch.testing.assert_close(combined.token_weights(site, omega), expected)
        assert combined.sites[site].shape[1] == 2 * source.sites[site].shape[1]


def test_a_chain_multiplies_the_shares(model, both):
    source, donor = both
    third = encoded(model, 2)
    chain = combine_sources(combine_sources(source, donor, [0.5] * 7), third, [0.5] * 7)
    assert isinstance(chain, CombinedFeatures) and len(chain.parts) == 3
    torch.testing.assert_close(chain.weights, torch.tensor([0.25, 0.25, 0.5])[:, None].expand(3, 7))
    torch.testing.assert_close(chain.weights.sum(0), torch.ones(7))


def test_combining_a_person_with_itself_places_its_regions_where_they_were(both):
    source, _ = both
    pose = people().target.keypoints[:1]
    same = combine_sources(source, source, only("upper", "hair"))
    alone = source.prior(pose, 32, 24)
    # Painting a region of the same person on itself sharpens soft edges and moves nothing.
    assert (same.prior(pose, 32, 24).labels() == alone.labels()).float().mean() > 0.97
    torch.testing.assert_close(same.caa.tokens, source.caa.tokens)
    assert bool((same.caa.shown == source.caa.shown).all())


def test_the_donors_region_is_carried_and_the_rest_stays(both):
    source, donor = both
    pose = donor.body
    image, certain = combine_sources(source, donor, only("upper")).carried(pose)
    size = image.shape[-2:]
    mine, its = source.prior(pose, *size).masks, donor.prior(pose, *size).masks
    # Face, hair and accessories of the source lie over the donor's top, its other regions under it.
    over = mine[:, [Region.FACE, Region.HAIR, Region.ACCESSORY]].sum(1) < 0.01
    taken = (its[:, Region.UPPER] > 0.99) & over
    kept = (its[:, Region.UPPER] < 0.01) & (mine[:, Region.UPPER] < 0.01)
    assert taken.sum() > 50 and kept.sum() > 50
    for where, expected in ((taken, donor.carried(pose)[0]), (kept, source.carried(pose)[0])):
        where = where[:, None].expand_as(image)
        torch.testing.assert_close(image[where], expected[where], atol=0.02, rtol=0)
    assert certain.shape == (1, 1, *size) and certain.min() >= 0 and certain.max() <= 1


def test_the_pipeline_takes_it_like_any_source(model, both):
    source, donor = both
    pipe = TruePosePipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    pose = people().target.keypoints[:1]
    size = dict(zip(("height", "width"), model.config.size, strict=True))

    def picture(features, **more):
        return pipe(features, pose, num_inference_steps=1, **size, **more).images

    combined = combine_sources(source, donor, only("upper"))
    mixed, plain = picture(combined), picture(source)
    assert (mixed - plain).abs().max() > 1e-3
    # What is not read makes no difference.
    nothing = only()
    torch.testing.assert_close(picture(combined, region_weights=nothing), picture(source, region_weights=nothing))


def test_shares_near_an_end_lead_to_that_end(model, both):
    source, donor = both
    pipe = TruePosePipeline.from_model(small_model(caa=False, aligned=False))
    source, donor = (replace(x, caa=None, image=None) for x in (source, donor))
    pipe.set_progress_bar_config(disable=True)
    pose = people().target.keypoints[:1]

    def picture(features):
        return pipe(features, pose, height=64, width=48, num_inference_steps=1, target_parsing=parsing).images

    parsing = HumanParsing(people().target.parsing[:1])
    near = picture(combine_sources(source, donor, [1e-5] * 7))
    torch.testing.assert_close(near, picture(source), atol=2e-3, rtol=0)


def test_a_batch_is_combined_with_one(model):
    pairs = people()
    image, parsing, body = source_of(pairs, slice(0, 2))
    two = model.encode_source(image, parsing, body)
    combined = combine_sources(two, encoded(model, 2), only("upper"))
    turned = combine_sources(encoded(model, 2), two, only("upper"))
    assert combined.batch == turned.batch == 2
    pose = pairs.target.keypoints[:2]
    for row in range(2):
        alone = combine_sources(encoded(model, row), encoded(model, 2), only("upper"))
        torch.testing.assert_close(
            combined.prior(pose, 16, 12).masks[row], alone.prior(pose[row : row + 1], 16, 12).masks[0]
        )


def with_surface(features):
    aspect = features.latent_size[1] / features.latent_size[0]
    return replace(features, surface=SurfacePlaces.of_keypoints(features.body, aspect))


def test_a_batch_is_combined_with_one_on_their_bodies_surfaces(model):
    """Whichever of them is repeated for the batch, each row is as it is alone."""
    pairs = people()
    two = with_surface(model.encode_source(*source_of(pairs, slice(0, 2))))
    donor = with_surface(encoded(model, 2))
    pose = pairs.target.keypoints[:2]
    site = next(iter(two.sites))
    for first, second in ((two, donor), (donor, two)):
        combined = combine_sources(first, second, only("upper"))
        assert combined.coordinates(site).shape[::2] == (2, 4)
        prior = combined.prior(pose, 16, 12).masks
        for row in range(2):
            own = [donor if x is donor else with_surface(encoded(model, row)) for x in (first, second)]
            alone = combine_sources(*own, only("upper"))
            torch.testing.assert_close(prior[row], alone.prior(pose[row : row + 1], 16, 12).masks[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(combined.coordinates(site)[row], alone.coordinates(site)[0], atol=1e-3, rtol=0)


def test_a_skeleton_and_a_surface_are_not_combined(both):
    source, donor = both
    mixed = combine_sources(with_surface(source), donor, only("upper"))
    with pytest.raises(TruePoseError, match="goes by its body's surface and another by its skeleton"):
        mixed.coordinates(next(iter(mixed.sites)))


def test_what_does_not_fit_is_refused(both):
    source, donor = both
    with pytest.raises(TruePoseError, match="mannequin model and the donor with a sd15 model"):
        combine_sources(source, replace(donor, family="sd15"), only("upper"))
    with pytest.raises(TruePoseError, match="anew at every step"):
        combine_sources(source, replace(donor, latent=torch.zeros(1, 4, 8, 8)), only("upper"))
    with pytest.raises(TruePoseError, match="from 0 to 1"):
        combine_sources(source, donor, [2.0] * 7)
    bare = donor.parsing.masks.clone()
    bare[:, Region.BACKGROUND] += bare[:, Region.ACCESSORY]
    bare[:, Region.ACCESSORY] = 0
    with pytest.raises(TruePoseError, match="shows none of accessory"):
        combine_sources(source, replace(donor, parsing=HumanParsing(bare)), only("accessory"))


def test_the_first_persons_embedding_is_kept(both):
    source, donor = (replace(x, context=torch.full((1, 1, 8), float(i))) for i, x in enumerate(both))
    assert torch.equal(combine_sources(source, donor, only("upper")).context, source.context)


def test_it_moves_as_a_whole(both):
    combined = combine_sources(*both, only("upper"))
    half = combined.to(dtype=torch.bfloat16)
    assert isinstance(half, CombinedFeatures) and half.weights is combined.weights
    assert all(x.dtype == torch.bfloat16 for part in half.parts for x in part.sites.values())

"""Combined sources and frozen regions inside the host."""

from __future__ import annotations

import pytest
import torch
from bench import ALL, apply, close, far, model, parsing, reference, sample, source
from pack.nodes.host import features as host_features
from pack.nodes.parsing import FreezeRegions
from pack.nodes.source import CombineSources

from truepose_core.attention.hpfa import region_rows_weight
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.regions import REGION_NAMES


def combined(first, second, **shares):
    return CombineSources.execute(first, second, **shares).args[0]


def test_it_reads_each_region_from_the_person_it_was_taken_from():
    first, second = source(1), source(2)
    shares = {"upper": 1.0, "hair": 0.25}
    table = torch.tensor([shares.get(name, 0.0) for name in REGION_NAMES])
    both = combined(first, second, **shares)

    def bias(site, one, count):
        share = 1 - table if one is first else table
        weight = region_rows_weight(one.regions(site), share)[0]
        return weight.clamp(min=1e-30).log().expand(count, -1)

    unet = model().model.diffusion_model
    with reference(unet, [first, second], bias):
        expected = sample(model())
    got = sample(apply(model(), both))
    assert close(got, expected) and far(got, sample(apply(model(), first)))


def test_nothing_taken_is_the_source_itself_and_everything_the_donor():
    first, second = source(1), source(2)
    assert combined(first, second) is first
    assert combined(first, second, **dict.fromkeys(REGION_NAMES, 1.0)) is second


def test_region_weights_act_on_top():
    first, second = source(1), source(2)
    both = combined(first, second, upper=1.0)
    without = tuple(0.0 if name == "upper" else 1.0 for name in REGION_NAMES)
    # With the upper region off, neither top is read: the same as the first source without it.
    assert close(sample(apply(model(), both, without)), sample(apply(model(), first, without)))


def test_a_chain_of_three_is_one_source():
    people = [source(i) for i in (1, 2, 3)]
    chain = combined(combined(people[0], people[1], upper=1.0), people[2], lower=1.0)
    assert isinstance(chain, host_features.CombinedHostFeatures) and len(chain.parts) == 3
    assert chain.get_ram_usage() > sum(p.nbytes for p in people)
    assert far(sample(apply(model(), chain, ALL)), sample(apply(model(), people[0], ALL)))


def test_another_familys_donor_is_refused():
    second = source(2)
    stranger = host_features.HostFeatures("sdxl", second.sites, second.latent_size, second.parsing)
    with pytest.raises(TruePoseError, match="sdxl"):
        combined(source(1), stranger, upper=1.0)


def test_what_is_frozen_does_not_change():
    latent = torch.randn(1, 4, 12, 8)
    image = parsing(3)
    out, mask = FreezeRegions.execute({"samples": latent}, image, grow=0, blur=0.0, upper=True).args
    assert torch.equal(mask, image.mask("upper").float())
    assert torch.equal(out["samples"], latent) and out["noise_mask"].shape == (1, 1, 96, 64)
    wider = FreezeRegions.execute({"samples": latent}, image, grow=8, blur=2.0, upper=True).args[1]
    assert wider.sum() > mask.sum() and wider.min() >= 0 and wider.max() <= 1


def test_freezing_says_what_cannot_be():
    latent = {"samples": torch.zeros(1, 4, 12, 8)}
    with pytest.raises(TruePoseError, match="every region is frozen"):
        FreezeRegions.execute(latent, parsing(3), upper=False)
    nobody = HumanParsing.from_labels(torch.zeros(1, 96, 64, dtype=torch.long))
    with pytest.raises(TruePoseError, match="shows no upper"):
        FreezeRegions.execute(latent, nobody, upper=True)
    with pytest.raises(TruePoseError, match="another shape"):
        FreezeRegions.execute({"samples": torch.zeros(1, 4, 8, 12)}, parsing(3), upper=True)
    with pytest.raises(TruePoseError, match="holds 2 pictures"):
        FreezeRegions.execute({"samples": torch.zeros(3, 4, 12, 8)}, parsing(3, 2), upper=True)

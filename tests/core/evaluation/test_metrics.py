"""PSNR and SSIM inside the person, the clothes and the face."""

import math

import numpy as np
import pytest
import torch

from truepose_core.errors import TruePoseError
from truepose_core.evaluation.metrics import (
    AREAS,
    COLUMNS,
    PSNR_CAP,
    area_masks,
    masked_mean,
    masked_psnr,
    measure,
    ssim_map,
)
from truepose_core.mannequin.split import split_pairs
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region


@pytest.fixture(scope="module")
def target():
    return split_pairs(6, (64, 48)).target


def test_the_truth_has_the_cap_and_an_ssim_of_1(target):
    columns = measure(target.image, target.image, HumanParsing(target.parsing))
    assert tuple(columns) == COLUMNS
    for name, values in columns.items():
        counted = values[~values.isnan()]
        expected = PSNR_CAP if name.endswith("psnr") else 1.0
        assert torch.allclose(counted, torch.full_like(counted, expected), atol=1e-5)


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01])
def test_a_constant_error_has_the_psnr_of_its_size(target, error):
    columns = measure(target.image + error, target.image, HumanParsing(target.parsing))
    for area in AREAS:
        values = columns[f"{area}_psnr"]
        counted = values[~values.isnan()]
        assert len(counted)
        assert torch.allclose(counted, torch.full_like(counted, -20 * math.log10(error)), atol=1e-4)


def test_psnr_is_its_definition(target):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(target.image.shape, generator=generator)
    mask = torch.rand(images.shape[0], *images.shape[-2:], generator=generator) > 0.7
    for i, value in enumerate(masked_psnr(images, target.image, mask)):
        a, b = (x[i].permute(1, 2, 0)[mask[i]].numpy().astype(np.float64) for x in (images, target.image))
        assert value.item() == pytest.approx(10 * np.log10(1 / np.mean((a - b) ** 2)), abs=1e-4)


def test_psnr_ignores_what_is_outside_the_area(target):
    parsing = HumanParsing(target.parsing)
    outside = ~area_masks(parsing)["clothes"][:, None]
    images = torch.where(outside, torch.rand_like(target.image), target.image + 0.1)
    values = measure(images, target.image, parsing)["clothes_psnr"]
    assert torch.allclose(values, torch.full_like(values, 20.0), atol=1e-4)


def test_ssim_is_that_of_scikit_image(target):
    from skimage.metrics import structural_similarity

    images = (target.image + 0.1 * torch.randn(target.image.shape, generator=torch.Generator().manual_seed(1))).clamp(
        0, 1
    )
    ours = ssim_map(images, target.image).numpy()
    for i in range(len(images)):
        a, b = (x[i].permute(1, 2, 0).double().numpy() for x in (images, target.image))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        _, full = structural_similarity(a, b, channel_axis=2, data_range=1.0, full=True, **options)
        # The two libraries continue a picture in different ways past its border.
        inner = (slice(6, -6), slice(6, -6))
        assert np.abs(full.mean(2)[inner] - ours[i][inner]).max() < 2e-3


def test_areas_are_those_of_the_parsing():
    labels = torch.tensor([[[0, 1, 2, 3, 4, 5, 6]]])
    masks = area_masks(HumanParsing.from_labels(labels))
    of = {name: [Region(i) for i in mask[0, 0].nonzero()[:, 0].tolist()] for name, mask in masks.items()}
    assert of["foreground"] == [r for r in Region if r != Region.BACKGROUND]
    assert of["clothes"] == [Region.UPPER, Region.LOWER]
    assert of["face"] == [Region.FACE]


def test_an_area_that_is_not_seen_does_not_count():
    labels = torch.zeros(2, 16, 16, dtype=torch.long)
    labels[:, 4:12, 4:12] = Region.UPPER
    labels[1, 0, :3] = Region.FACE  # three pixels are too few
    images = torch.rand(2, 3, 16, 16)
    columns = measure(images, images, HumanParsing.from_labels(labels))
    assert columns["face_psnr"].isnan().all() and columns["face_ssim"].isnan().all()
    assert not columns["clothes_psnr"].isnan().any()


def test_masked_mean_of_a_constant_is_the_constant():
    values = torch.full((2, 8, 8), 0.3)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 2:5, 2:5] = True
    mean = masked_mean(values, mask)
    assert mean[0].item() == pytest.approx(0.3) and mean[1].isnan()


def test_pictures_of_another_size_are_refused(target):
    with pytest.raises(TruePoseError, match="one batch of one size"):
        measure(target.image[..., :32], target.image, HumanParsing(target.parsing))

"""The garment swap's truth and its numbers."""

from __future__ import annotations

import torch
from small import small_model

from truepose_core.evaluation.swap import dressed, evaluate_swap
from truepose_core.mannequin import render, sample_identities, sample_poses
from truepose_core.pipeline import TruePosePipeline
from truepose_core.regions import Region


def test_only_the_top_changes_hands():
    people, donors = sample_identities(range(4), 5), sample_identities(range(10, 14), 5)
    poses = sample_poses(range(4), 5)
    plain, mixed = (render(who, poses, 64, 48) for who in (people, dressed(people, donors)))
    same = [Region.FACE, Region.LOWER, Region.BACKGROUND]
    where = (torch.minimum(plain.parsing, mixed.parsing)[:, same].sum(1) > 0.999)[:, None].expand_as(plain.image)
    assert where.any()
    torch.testing.assert_close(plain.image[where], mixed.image[where], atol=0.05, rtol=0)
    top = (mixed.parsing[:, Region.UPPER] > 0.99)[:, None].expand_as(plain.image)
    assert (plain.image - mixed.image)[top].abs().mean() > 0.05
    assert torch.equal(plain.keypoints, mixed.keypoints)


def test_the_report_compares_the_same_people_with_and_without():
    pipe = TruePosePipeline.from_model(small_model(caa=False))
    pipe.set_progress_bar_config(disable=True)
    report = evaluate_swap(pipe, pairs=3, steps=1)
    assert report.pairs == 3 and all(0 < x < 60 for x in (*report.upper_psnr, *report.face_psnr))
    assert "| upper PSNR, dB |" in report.markdown()

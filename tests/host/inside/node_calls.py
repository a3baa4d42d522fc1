"""The nodes themselves, called as the host calls them: what they return, and what they say about bad input."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import folder_paths
import pytest
import torch
from bench import far, model, sample
from fixtures.tiny import make_conditioning, make_model, make_vae
from pack.nodes import TruePoseExtension
from pack.nodes import schema as nodes_schema
from pack.nodes.host import call as host_call
from pack.nodes.host import features as host_features
from pack.nodes.host import patch as host_patch
from pack.nodes.parsing import ParsingFromLabels, ParsingFromMasks, ParsingToMasks, ParsingToSEGS
from pack.nodes.pose import PASTED, DrawSkeleton, LoadPose
from pack.nodes.source import ApplyHPFA, SourceNetEncode

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.regions import REGION_NAMES


def run(node: type, **inputs: object) -> tuple:
    return node.execute(**inputs).result


def person(height: int = 96, width: int = 64, batch: int = 1) -> tuple[torch.Tensor, HumanParsing]:
    """A picture with a top and trousers."""
    labels = torch.zeros(batch, height, width, dtype=torch.int64)
    labels[:, height // 4 : height // 2, width // 4 : -width // 4] = 3
    labels[:, height // 2 : -height // 8, width // 4 : -width // 4] = 4
    image = torch.rand((batch, height, width, 3), generator=torch.Generator().manual_seed(1))
    return image, HumanParsing.from_labels(labels)


def pose(people: int = 1, width: int = 64, height: int = 96) -> list[dict]:
    """One frame of POSE_KEYPOINT."""
    generator = torch.Generator().manual_seed(2)
    listed = []
    for _ in range(people):
        xy = torch.rand((18, 2), generator=generator) * torch.tensor([width, height])
        flat = torch.cat([xy, torch.ones(18, 1)], 1).flatten().tolist()
        listed.append({"pose_keypoints_2d": flat})
    return [{"canvas_width": width, "canvas_height": height, "people": listed}]


@pytest.fixture(scope="module")
def vae() -> object:
    return make_vae()


def all_nodes() -> list[type]:
    return asyncio.run(TruePoseExtension().get_node_list())


def test_every_node_is_documented() -> None:
    docs = Path(host_call.__file__).parents[2] / "web" / "docs"
    for node in all_nodes():
        schema = node.GET_SCHEMA()
        assert schema.node_id.startswith("TruePose") and schema.category.split("/")[0] == "TruePose"
        assert schema.display_name and schema.description, schema.node_id
        for one in (*schema.inputs, *schema.outputs):
            assert one.tooltip, f"{schema.node_id}.{one.id} has no tooltip"
        page = (docs / f"{schema.node_id}.md").read_text()
        for one in schema.inputs:
            assert f"**{one.id}**" in page, f"{schema.node_id}.md does not speak of {one.id}"


def test_no_menu_is_long_and_common_names_say_whose_they_are() -> None:
    menus = Counter(node.GET_SCHEMA().category for node in all_nodes())
    assert set(menus) == {f"TruePose/{name}" for name in nodes_schema.MENU}
    assert min(menus.values()) >= 2 and max(menus.values()) <= 10
    listed = [name for names in nodes_schema.MENU.values() for name in names]
    assert sorted(listed) == sorted(node.GET_SCHEMA().node_id.removeprefix("TruePose") for node in all_nodes())
    names = {node.GET_SCHEMA().display_name for node in all_nodes()}
    assert {"Load Pose (TruePose)", "Mannequin (TruePose)", "SourceNet Encode"} <= names


def test_the_models_folder_is_there() -> None:
    """To put files into, before anything was downloaded or converted."""
    assert Path(folder_paths.models_dir, "truepose").is_dir()


def test_encode_and_apply(vae: object) -> None:
    image, parsing = person()
    (source,) = run(
        SourceNetEncode, model=model(), vae=vae, image=image, parsing=parsing, conditioning=make_conditioning(3)
    )
    assert isinstance(source, host_features.HostFeatures) and source.latent_size == (12, 8)
    (patched,) = run(ApplyHPFA, model=model(), source=source)
    assert far(sample(patched), sample(model()))
    (same,) = run(ApplyHPFA, model=model(), source=source, strength=0.0)
    assert torch.equal(sample(same), sample(model()))
    nothing = dict.fromkeys(REGION_NAMES, 0.0)
    (same,) = run(ApplyHPFA, model=model(), source=source, **nothing)
    assert torch.equal(sample(same), sample(model()))


@pytest.mark.parametrize("channels", [3, 4])
def test_odd_sizes_and_alpha(vae: object, channels: int) -> None:
    image, parsing = person(101, 67)
    image = torch.cat([image, torch.ones(1, 101, 67, channels - 3)], -1)
    (source,) = run(SourceNetEncode, model=model(), vae=vae, image=image, parsing=parsing, pose=pose(1, 67, 101))
    assert source.latent_size == (13, 9)
    assert source.parsing.size == (104, 72)
    # Keypoints keep their pixel when the picture grows on all sides.
    given = torch.tensor(pose(1, 67, 101)[0]["people"][0]["pose_keypoints_2d"]).reshape(18, 3)[:, :2]
    middle = torch.tensor([(72 - 67) // 2, (104 - 101) // 2])
    assert torch.allclose(source.body[0, :, :2] * torch.tensor([72.0, 104.0]), given + middle, atol=1e-3)
    assert bool(sample(run(ApplyHPFA, model=model(), source=source)[0], height=13, width=9).isfinite().all())


def test_target_pose_carries_the_parsing(vae: object) -> None:
    image, parsing = person()
    (source,) = run(SourceNetEncode, model=model(), vae=vae, image=image, parsing=parsing, pose=pose())
    (plain,) = run(ApplyHPFA, model=model(), source=source)
    (carried,) = run(ApplyHPFA, model=model(), source=source, target_pose=pose(1))
    applied = host_patch.applied_sources(carried)[0]
    assert applied.target is not None and applied.target.size == parsing.size
    assert far(sample(plain), sample(carried))
    (given,) = run(ApplyHPFA, model=model(), source=source, target_pose=pose(1), target_parsing=parsing)
    assert torch.equal(host_patch.applied_sources(given)[0].target.masks, parsing.masks)


class TestEncodeRefuses:
    def refuse(self, match: str, vae: object, **inputs: object) -> None:
        image, parsing = person()
        given = {"model": model(), "vae": vae, "image": image, "parsing": parsing, **inputs}
        with pytest.raises(TruePoseError, match=match):
            run(SourceNetEncode, **given)

    def test_parsing_of_another_size(self, vae: object) -> None:
        self.refuse("64x64 and the image 64x96", vae, parsing=person(64, 64)[1])

    def test_parsing_of_another_batch(self, vae: object) -> None:
        self.refuse("3 pictures and the image 1", vae, parsing=person(batch=3)[1])

    def test_empty_parsing(self, vae: object) -> None:
        empty = HumanParsing.from_labels(torch.zeros(1, 96, 64, dtype=torch.int64))
        self.refuse("shows nobody", vae, parsing=empty)

    def test_pose_without_people(self, vae: object) -> None:
        self.refuse("shows nobody", vae, pose=pose(0))

    def test_nan_image(self, vae: object) -> None:
        self.refuse("NaN", vae, image=torch.full((1, 96, 64, 3), torch.nan))


class TestApplyRefuses:
    def test_another_family(self, vae: object) -> None:
        image, parsing = person()
        other = make_model(0, "SDXL")
        (source,) = run(SourceNetEncode, model=other, vae=vae, image=image, parsing=parsing)
        with pytest.raises(TruePoseError, match="same family"):
            run(ApplyHPFA, model=model(), source=source)

    def test_a_window_that_ends_before_it_starts(self, vae: object) -> None:
        image, parsing = person()
        (source,) = run(SourceNetEncode, model=model(), vae=vae, image=image, parsing=parsing)
        with pytest.raises(TruePoseError, match=r"start_percent 0\.8 is after end_percent 0\.2"):
            run(ApplyHPFA, model=model(), source=source, start_percent=0.8, end_percent=0.2)

    def test_target_pose_without_people(self, vae: object) -> None:
        image, parsing = person()
        (source,) = run(SourceNetEncode, model=model(), vae=vae, image=image, parsing=parsing)
        with pytest.raises(TruePoseError, match="the target pose shows nobody"):
            run(ApplyHPFA, model=model(), source=source, target_pose=pose(0))


def test_masks_to_parsing_and_back() -> None:
    _, parsing = person()
    together, *masks, preview = run(
        ParsingToMasks, parsing=parsing, upper=True, **{n: False for n in REGION_NAMES if n != "upper"}
    )
    assert torch.equal(together, parsing.mask("upper"))
    assert len(masks) == 7 and all(torch.equal(m, parsing.mask(n)) for m, n in zip(masks, REGION_NAMES, strict=True))
    assert preview.shape == (1, 96, 64, 3)
    back, _ = run(ParsingFromMasks, upper=masks[3], lower=masks[4][0])
    assert torch.equal(back.masks, parsing.masks)


def test_what_is_worn_covers_the_skin() -> None:
    everywhere = torch.ones(1, 8, 8)
    (parsing, _) = run(ParsingFromMasks, skin=everywhere, upper=everywhere, accessory=torch.zeros(1, 8, 8))
    assert bool((parsing.labels() == 3).all())


def test_label_map_and_preview_are_inverse() -> None:
    _, parsing = person()
    preview = run(ParsingToMasks, parsing=parsing)[-1]
    back, _ = run(ParsingFromLabels, label_map=preview)
    assert torch.equal(back.labels(), parsing.labels())
    grey = torch.full((1, 4, 4, 3), 4 / 255)  # ATR 4 is upper clothes
    assert bool((run(ParsingFromLabels, label_map=grey, labels="atr")[0].labels() == 3).all())


def test_segs_are_the_regions_boxes() -> None:
    _, parsing = person()
    ((size, segs),) = run(ParsingToSEGS, parsing=parsing, crop_factor=1.5)
    assert size == (96, 64) and [s.label for s in segs] == ["upper", "lower"]
    upper = segs[0]
    assert upper.bbox == (16, 24, 48, 48) and upper.crop_region == [8, 18, 56, 54]
    x1, y1, x2, y2 = upper.crop_region
    assert upper.cropped_mask.shape == (y2 - y1, x2 - x1)
    assert upper.cropped_mask.sum() == float(parsing.mask("upper").sum())
    assert upper._fields[:4] == ("cropped_image", "cropped_mask", "confidence", "crop_region")
    with pytest.raises(TruePoseError, match="one picture"):
        run(ParsingToSEGS, parsing=person(batch=2)[1])


def test_no_mask_is_refused() -> None:
    with pytest.raises(TruePoseError, match="no mask is connected"):
        run(ParsingFromMasks)


def test_load_pose_from_text_and_file() -> None:
    text = json.dumps(pose())
    loaded, width, height = run(LoadPose, file=PASTED, json=text)
    assert (width, height) == (64, 96) and len(loaded[0]["people"][0]["face_keypoints_2d"]) == 210
    folder = Path(folder_paths.get_input_directory())
    (folder / "poses").mkdir(parents=True, exist_ok=True)
    (folder / "poses" / "one.json").write_text(text)
    assert "poses/one.json" in LoadPose.define_schema().inputs[0].options
    assert run(LoadPose, file="poses/one.json")[0] == loaded
    before = LoadPose.fingerprint_inputs(file="poses/one.json", json="")
    (folder / "poses" / "one.json").write_text(text + " ")
    assert LoadPose.fingerprint_inputs(file="poses/one.json", json="") != before
    for bad, match in (("", "no pose was given"), ("{", "not valid JSON"), ("[]", "empty list")):
        with pytest.raises(TruePoseError, match=match):
            run(LoadPose, file=PASTED, json=bad)
    with pytest.raises(TruePoseError, match="outside ComfyUI's input folder"):
        run(LoadPose, file="../../secret.json")


def test_draw_skeleton() -> None:
    (image,) = run(DrawSkeleton, pose=pose())
    assert image.shape == (1, 96, 64, 3) and float(image.max()) > 0.5
    (image,) = run(DrawSkeleton, pose=[*pose(), *pose(2)], width=128, height=80)
    assert image.shape == (2, 80, 128, 3)
    with pytest.raises(TruePoseError, match="shows nobody"):
        run(DrawSkeleton, pose=pose(0))

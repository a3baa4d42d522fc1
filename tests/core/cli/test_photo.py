"""Photographs in `truepose transfer`: parsers, estimated and ready poses, retargeting, crops, regions of others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("cv2")

from onnx_models import save_add_one, save_parser, save_schp
from onnx_pose_models import save_boxes, save_pose
from PIL import Image
from small import small_model

from truepose_core.cli import main
from truepose_core.cli.demo import render_person
from truepose_core.cli.transfer.inputs import anchor_way, fit_body, retargeted
from truepose_core.cli.transfer.person import PersonPhoto, model_sizes
from truepose_core.errors import TruePoseError
from truepose_core.framing.crop import BUCKETS, best_bucket, crop_person, grow, person_box
from truepose_core.models.store import save_model
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.from_keypoints import parse_from_keypoints
from truepose_core.parsing.onnx import choose_parser, parse_image
from truepose_core.pictures.files import load_image, save_image
from truepose_core.pipeline import TruePosePipeline
from truepose_core.pose import Person, Pose, body_tensor, read_pose, write_pose
from truepose_core.pose.estimation import choose_estimator, estimate_pose
from truepose_core.pose.gallery import NAMES, gallery_pose
from truepose_core.pose.retarget import retarget
from truepose_core.regions import REGION_NAMES, Region
from truepose_core.source.combine import CombinedFeatures

SIZE = (128, 96)
PEOPLE = {"a": 5, "b": 6, "c": 23}


def write(path: Path, *people: Person, size: tuple[int, int] = SIZE) -> Path:
    path.write_text(json.dumps(write_pose(Pose(size[1], size[0], people))))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three mannequins (a.png, a-map.png, a-pose.json, ...), a pose, a small model, and tiny networks in models/."""
    folder = tmp_path_factory.mktemp("photo")
    for name, number in PEOPLE.items():
        views = render_person(number, ("stand", "wave"), SIZE)
        save_image(views.image[:1], folder / f"{name}.png")
        save_image(HumanParsing.from_labels(views.parsing[:1].argmax(1)).preview(), folder / f"{name}-map.png")
        write(folder / f"{name}-pose.json", Person(views.keypoints[0].numpy()))
    write(folder / "wave.json", Person(views.keypoints[1].numpy()))
    save_model(small_model(), folder / "tiny.safetensors")
    models = folder / "models"
    models.mkdir()
    save_schp(models, "atr")
    save_pose(models / "dw-ll_ucoco_384.onnx")
    # In the 640 x 640 picture that the detector sees; a mannequin's picture fills 640 x 480 of it.
    save_boxes(models / "yolox_l.onnx", np.array([[40, 20, 440, 620, 0.9]]))
    return folder


class Command:
    """`truepose transfer` in a folder: its exit code, what it printed, and what reached the pipeline."""

    def __init__(self, folder: Path, out: Path, capsys, monkeypatch):
        self.folder, self.out, self.capsys = folder, out, capsys
        self.read: list[tuple] = []
        self.features = self.bodies = None
        encode, call = TruePosePipeline.encode_source, TruePosePipeline.__call__

        def encode_source(pipe, *given):
            self.read.append(given)
            return encode(pipe, *given)

        def sample(pipe, features, bodies, **options):
            self.features, self.bodies = features, bodies
            return call(pipe, features, bodies, **options)

        monkeypatch.setattr(TruePosePipeline, "encode_source", encode_source)
        monkeypatch.setattr(TruePosePipeline, "__call__", sample)
        monkeypatch.chdir(folder)

    def argv(self, *words, source="a.png", pose=("wave.json",), out=None):
        given = ["transfer", source, "--pose", *pose, "--out", out or self.out, "--model", "tiny.safetensors"]
        return [str(x) for x in (*given, "--steps", 1, "--device", "cpu", "--models", "models", *words)]

    def __call__(self, *words, **more) -> dict:
        """The report of a command that works."""
        self.read = []
        code = main([*self.argv(*words, **more), "--json", "--overwrite"])
        said = self.capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out)

    def refused(self, message, *words, **more) -> None:
        """The command ends with one line that says `message`, runs no model and leaves nothing."""
        self.read = []
        before = sorted(self.folder.rglob("*")) + sorted(self.out.parent.rglob("*"))
        code = main(self.argv(*words, **more))
        said = self.capsys.readouterr()
        errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert (code, said.out, len(errors)) == (2, "", 1), said.err
        assert message in errors[0]
        assert not self.read
        assert sorted(self.folder.rglob("*")) + sorted(self.out.parent.rglob("*")) == before


@pytest.fixture
def transfer(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    return Command(folder, tmp_path / "out" / "result.png", capsys, monkeypatch)


POSE = ("--source-pose", "a-pose.json")
MAP = ("--parsing", "a-map.png")
DONOR = ("--from", "upper=b.png", "--from-parsing", "b-map.png", "--from-pose", "b-pose.json")


def person_of(path) -> Person:
    return read_pose(path)[0].people[0]


def same(parsing: HumanParsing, other: HumanParsing) -> bool:
    return torch.equal(parsing.masks, other.masks)


# ---------------------------------------------------------------------------------------------------- parsing


def test_parser_keypoints_is_the_parsing_from_keypoints(transfer):
    report = transfer("--parser", "keypoints", *POSE)
    image, parsing, body = transfer.read[0][:3]
    assert torch.equal(body, body_tensor([person_of("a-pose.json")]))
    assert same(parsing, parse_from_keypoints(image, body))
    assert report["parsing"] == "from keypoints"


@pytest.mark.parametrize("name", ["schp-atr", "parsing_atr.onnx", "models/parsing_atr.onnx"])
def test_a_network_makes_the_parsing(transfer, name):
    report = transfer("--parser", name)
    image, parsing, body = transfer.read[0][:3]
    assert body is None
    assert same(parsing, parse_image(image, choose_parser("schp-atr", ["models"], provider="CPU")))
    assert report["parsing"] == "by parsing_atr.onnx (as schp-atr) on CPU"


def test_what_was_done_is_said(transfer, capsys):
    words = ("--parser", "keypoints", *POSE, "--retarget", "hips", "--frame", *DONOR)
    assert main(transfer.argv(*words)) == 0
    out = capsys.readouterr().out
    for line in (
        "a.png: parsing from keypoints, pose a-pose.json",
        "upper from b.png: parsing b-map.png, pose b-pose.json",
        "poses on the proportions of the person in a.png, by the hips",
        "crop: ",
        f"wrote {transfer.out} (192x256)",
    ):
        assert line in out


def test_models_are_looked_for_and_never_fetched(transfer, monkeypatch, tmp_path):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("something was downloaded"))
    empty = tmp_path / "none"
    hint = f"put it at {empty / 'parsing_lip.onnx'}"
    transfer.refused(hint, "--parser", "schp-lip", "--models", empty)
    transfer.refused("--parser keypoints needs no model", "--parser", "schp-lip", "--models", empty)
    hint = f"put it at {empty / 'dw-ll_ucoco_384.onnx'}"
    transfer.refused(hint, *MAP, "--estimate-pose", "--models", empty)
    transfer.refused("there is no parser 'magic'", "--parser", "magic")


def test_bad_networks_are_refused(transfer, tmp_path, monkeypatch):
    whole = (transfer.folder / "models" / "parsing_atr.onnx").read_bytes()
    files = {name: tmp_path / f"{name}.onnx" for name in ("cut", "strange", "other", "newer")}
    files["cut"].write_bytes(whole[: len(whole) // 2])
    files["strange"].write_bytes(whole)
    save_add_one(files["other"])
    save_add_one(files["newer"], ir_version=99)
    for name, message in (
        ("cut", "is truncated or damaged"),
        ("strange", "its labels are unknown"),
        ("other", "is not a parser that is known"),
        ("newer", "was made for a newer onnxruntime"),
    ):
        transfer.refused(message, "--parser", files[name])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    transfer.refused("pip install onnxruntime", "--parser", "schp-atr")
    monkeypatch.setitem(sys.modules, "cv2", None)
    transfer.refused("pip install opencv-python-headless", "--parser", "keypoints", *POSE)


def test_nobody_is_said_with_the_picture(transfer, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    # Every label is as likely, and two of three are background.
    save_parser(models / "blind.onnx", {"out": 3}, strength=0.0)
    labels = {"wall": "background", "floor": "background", "shirt": "upper"}
    (models / "blind.json").write_text(json.dumps({"labels": labels, "input_size": [512, 512]}))
    message = "nobody was found in picture a.png: its parsing by blind.onnx (as blind.json) on CPU"
    transfer.refused(message, "--parser", "blind.onnx", "--models", models)
    save_pose(models / "dw-ll_ucoco_384.onnx")
    save_boxes(models / "yolox_l.onnx", np.array([[40, 20, 440, 620, 0.1]]))
    message = "picture a.png: nobody was found in picture 0: no person was detected"
    transfer.refused(message, *MAP, "--estimate-pose", "--models", models)


# ---------------------------------------------------------------------------------------------------- poses


def estimated(image) -> Person:
    return estimate_pose(image, choose_estimator(["models"], provider="CPU"))[0].people[0]


def test_poses_are_estimated_where_none_are_given(transfer):
    report = transfer(*MAP, "--estimate-pose", pose=("b.png", "wave.json"), out=transfer.out.parent)
    image, _, body = transfer.read[0][:3]
    assert torch.equal(body, body_tensor([estimated(image)]))
    assert report["source_pose"] == "estimated by yolox_l.onnx on CPU and dw-ll_ucoco_384.onnx on CPU"
    assert [Path(x["path"]).name for x in report["outputs"]] == ["b.png", "wave.png"]
    transfer(*MAP, *POSE, "--estimate-pose", pose=("b.png",))
    assert torch.equal(transfer.read[0][2], body_tensor([person_of("a-pose.json")]))
    assert torch.allclose(transfer.bodies, body_tensor([estimated(load_image("b.png"))]), atol=1e-6)


def test_of_several_people_the_largest_is_taken_and_said(transfer, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    save_schp(models, "atr")
    save_pose(models / "dw-ll_ucoco_384.onnx")
    save_boxes(models / "yolox_l.onnx", np.array([[0, 20, 200, 620, 0.9], [250, 20, 470, 620, 0.9]]))
    words = ("--estimate-pose", "--models", models, "--parser", "schp-atr")
    notes = transfer(*words)["notes"]
    assert any("picture a.png has 2 people; taking person" in note for note in notes)
    assert any("the parser shows all 2 people of a.png; add --frame" in note for note in notes)
    bodies = []
    for index in (0, 1):
        assert not any("taking person" in note for note in transfer(*words, "--source-person", index)["notes"])
        bodies.append(transfer.read[0][2])
    assert not torch.equal(*bodies)
    transfer.refused("expected an index from 0 to 1", *words, "--source-person", 2)


@pytest.mark.parametrize("text", ["gallery:hands on hips", "gallery:hands-on-hips", "gallery:Hands-on-hips"])
def test_a_ready_pose(transfer, text):
    report = transfer(*MAP, "--size", "90x120", pose=(text, "wave.json"), out=transfer.out.parent)
    assert Path(report["outputs"][0]["path"]).name == "hands-on-hips.png"
    transfer(*MAP, "--size", "90x120", pose=(text,))
    assert torch.allclose(transfer.bodies, body_tensor(gallery_pose("hands on hips", 90, 120).people), atol=1e-6)


def test_a_wrong_ready_pose_lists_all(transfer):
    for name in NAMES:
        transfer.refused(f"gallery:{name.replace(' ', '-')}", *MAP, pose=("gallery:flying",))


def test_retargeting_is_the_libraries(transfer):
    transfer(*MAP, *POSE, "--retarget", "hips", "--size", "96x160", pose=("gallery:walking",))
    target = body_tensor(gallery_pose("walking", 96, 160).people)
    source = body_tensor([person_of("a-pose.json")])
    expected = retarget(target, source, aspect=96 / 160, source_aspect=96 / 128, anchor="hips", one_person=True)
    torch.testing.assert_close(transfer.bodies, expected, atol=1e-6, rtol=0)
    transfer(*MAP, *POSE, "--retarget", pose=("a-pose.json",))
    torch.testing.assert_close(transfer.bodies, source, atol=1e-5, rtol=0)


@pytest.mark.parametrize("anchor", ["feet", "hips"])
def test_in_the_photo_somebody_elsewhere_of_another_size_comes_back_to_themselves(anchor):
    image = torch.zeros(1, 3, *SIZE)
    parsing = HumanParsing.from_labels(torch.ones(1, *SIZE, dtype=torch.int64))
    body = render_person(5, ("stand",), SIZE).keypoints[0]
    photo = PersonPhoto("a.png", image, parsing, Person(body.numpy()), "", None, SIZE[::-1])
    moved = body.clone()
    moved[:, :2] = 0.6 * body[:, :2] + torch.tensor([0.3, 0.05])
    (found,) = retargeted([moved], photo, SIZE[::-1], anchor, True, "the pose")
    torch.testing.assert_close(found, body, atol=1e-5, rtol=0)
    (alone,) = retargeted([moved], photo, SIZE[::-1], anchor, False, "the pose")
    torch.testing.assert_close(alone, moved, atol=1e-5, rtol=0)
    # A walk stays a walk: all frames go the first one's way.
    further = moved + torch.tensor([0.1, 0, 0])
    frames = retargeted([moved, further], photo, SIZE[::-1], anchor, True, "the pose")
    torch.testing.assert_close(frames[1] - frames[0], further - moved, atol=1e-5, rtol=0)


def test_the_anchor_is_what_both_show():
    body, other = torch.zeros(18, 3), torch.zeros(18, 3)
    for joint, y in ((1, 0.2), (8, 0.5), (11, 0.5), (10, 0.9), (13, 0.8)):
        body[joint] = torch.tensor([0.5, y, 1])
        other[joint] = torch.tensor([0.6, y + 0.05, 1])
    way = torch.tensor([0.1, 0.05])
    for lost in ((), (10, 13), (8, 11)):
        other[list(lost)] = 0
        torch.testing.assert_close(anchor_way(body, other, "feet"), way)
    other[1] = 0
    with pytest.raises(TruePoseError, match="neither ankles, hips nor neck"):
        anchor_way(body, other, "feet")


def test_missing_limbs_and_cut_people_are_said(transfer, tmp_path):
    body = person_of("a-pose.json").body.copy()
    body[[4, 9, 10, 12, 13]] = 0
    path = write(tmp_path / "half.json", Person(body))
    photo = tmp_path / "half.png"
    Image.open("a.png").crop((0, 0, 96, 80)).save(photo)
    points = body * (1, SIZE[0] / 80, 1)
    write(tmp_path / "half-photo.json", Person(points), size=(80, 96))
    notes = transfer(*MAP, "--source-pose", path)["notes"]
    assert any("lacks r_wrist, r_knee, r_ankle, l_knee, l_ankle" in note for note in notes)
    report = transfer("--parser", "keypoints", "--source-pose", tmp_path / "half-photo.json", source=photo)
    assert report["cut"] == ["bottom"]
    assert any("reaches the bottom edge of the picture" in note for note in report["notes"])
    nothing = np.zeros((18, 3))
    nothing[1] = (0.5, 0.3, 1)
    path = write(tmp_path / "neck.json", Person(nothing))
    transfer.refused("no part of the body can be measured", *MAP, "--source-pose", path, "--retarget")


# ---------------------------------------------------------------------------------------------------- crops


@pytest.fixture
def scene(folder, tmp_path):
    """A photo of 300 x 220 with the mannequin in it, and its keypoints."""
    pixels = np.random.default_rng(0).integers(0, 255, (220, 300, 3), dtype=np.uint8)
    pixels[60 : 60 + SIZE[0], 120 : 120 + SIZE[1]] = np.asarray(Image.open(folder / "a.png").convert("RGB"))
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    body = person_of(folder / "a-pose.json").body.copy()
    body[:, :2] = (body[:, :2] * SIZE[::-1] + (120, 60)) / (300, 220)
    person = Person(body)
    return tmp_path / "scene.png", write(tmp_path / "scene.json", person, size=(220, 300)), person


def test_a_crop_is_the_libraries_and_the_output(transfer, scene):
    path, pose, person = scene
    report = transfer("--parser", "keypoints", "--source-pose", pose, "--frame", "90x120", source=path)
    image = load_image(path)
    whole = parse_from_keypoints(image, body_tensor([person]))
    crop = crop_person((220, 300), person_box((220, 300), whole, person), (120, 90))
    read, parsing, body = transfer.read[0][:3]
    assert torch.equal(read, crop.apply(image, crop.view(image).mean((0, 2, 3)).tolist()))
    assert same(parsing, crop.apply_parsing(whole))
    torch.testing.assert_close(body, crop.apply_keypoints(body_tensor([person])))
    assert report["frame"]["box"] == list(crop.box)
    assert report["size"] == [90, 120]
    assert load_image(transfer.out).shape == (1, 3, 120, 90)


def test_pasted_back_the_photo_stays_around_the_crop(transfer, scene):
    path, pose, _ = scene
    words = ("--parser", "keypoints", "--source-pose", pose, "--frame", "--paste-back", "8", "--retarget")
    report = transfer(*words, source=path, pose=("gallery:arms-raised",))
    photo, result = load_image(path), load_image(transfer.out)
    assert result.shape == photo.shape
    left, top, right, bottom = (max(0, x) for x in report["frame"]["box"])
    changed = (photo != result).any(1)[0]
    inside = torch.zeros_like(changed)
    inside[top:bottom, left:right] = True
    assert not changed[~inside].any()
    assert changed[inside].float().mean() > 0.9
    # The crop holds the new pose too, and the person stands where they stood.
    assert transfer.bodies[0, :, :2].min() > 0 and transfer.bodies[0, :, :2].max() < 1
    feet = [x[:, 1].max().item() for x in (transfer.bodies[0, [10, 13]], transfer.read[0][2][0, [10, 13]])]
    assert feet[0] == pytest.approx(feet[1], abs=1e-4)


def test_pasting_back_what_was_cropped_changes_nothing(transfer, scene, monkeypatch):
    path, pose, _ = scene
    # At scale 1 the crop's pixels are the photo's own.
    monkeypatch.setattr("truepose_core.cli.transfer.command._sample", lambda *_: [transfer.read[0][0]])
    words = ("--parser", "keypoints", "--source-pose", pose, "--frame", "200x200", "--paste-back")
    monkeypatch.setattr("truepose_core.cli.transfer.person.MARGIN", 0.0)
    box = []
    monkeypatch.setattr(PersonPhoto, "box", property(lambda self: box[0]))
    box.append((60.0, 10.0, 260.0, 210.0))
    report = transfer(*words, source=path, pose=(str(pose),))
    assert report["frame"]["box"] == [60, 10, 260, 210]
    assert torch.equal(load_image(transfer.out), load_image(path))


def test_sizes_that_suit_a_model(folder, tmp_path):
    assert model_sizes("bundled") == ((256, 192),)
    assert model_sizes(str(folder / "tiny.safetensors")) == ((256, 192),)
    for name, config, sizes in (
        ("sd", {}, BUCKETS["SD1.5"]),
        ("xl", {"addition_embed_type": "text_time"}, BUCKETS["SDXL"]),
    ):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "config.json").write_text(json.dumps(config))
        assert model_sizes(str(tmp_path / name)) == sizes
    with pytest.raises(TruePoseError, match=r"has no config\.json that can be read"):
        model_sizes(str(tmp_path))
    large = save_model(small_model(size=(768, 512)), tmp_path / "a.safetensors")
    assert model_sizes(str(large)) == ((768, 512),)


def test_the_best_bucket_is_taken(transfer, scene, tmp_path):
    path, pose, person = scene
    (tmp_path / "sd" / "unet").mkdir(parents=True)
    (tmp_path / "sd" / "unet" / "config.json").write_text("{}")
    whole = parse_from_keypoints(load_image(path), body_tensor([person]))
    box = person_box((220, 300), whole, person)
    assert best_bucket([grow(box, 0.1)], BUCKETS["SD1.5"]) == (768, 512)
    seen = []
    words = ("--parser", "keypoints", "--source-pose", str(pose), "--frame", "--model", str(tmp_path / "sd"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "truepose_core.cli.transfer.inputs._check_inside", lambda body, where, size, *_: seen.append(size)
        )
        transfer.refused("cannot be loaded as UNet2DConditionModel", *words, source=path)
    assert seen == [(512, 768)]


def test_a_huge_photo(transfer, tmp_path):
    wide = tmp_path / "wide.png"
    Image.new("RGB", (12000, 64)).save(wide)
    points = np.zeros((18, 3))
    points[[1, 2, 5, 8, 11]] = [(0.5, 0.3, 1), (0.4995, 0.3, 1), (0.5005, 0.3, 1), (0.4997, 0.7, 1), (0.5003, 0.7, 1)]
    pose = write(tmp_path / "wide.json", Person(points), size=(64, 12000))
    words = ("--parser", "keypoints", "--source-pose", pose)
    transfer.refused("the source is 12000x64 pixels and a result may have 4096 a side", *words, source=wide)
    transfer.refused("make the photo smaller", *words, "--frame", "--paste-back", source=wide)
    notes = transfer(*words, "--frame", "48x64", source=wide)["notes"]
    assert any("12000x64 pixels; it is read at 4096x22" in note for note in notes)
    labels = np.zeros((64, 12000), np.uint8)
    labels[:, 5000:7000] = 3
    Image.fromarray(labels).save(tmp_path / "map.png")
    notes = transfer("--parsing", tmp_path / "map.png", "--size", "96x64", source=wide)["notes"]
    assert transfer.read[0][1].size == (22, 4096)
    assert not any("label map" in note for note in notes)


# ---------------------------------------------------------------------------------------------------- donors


def test_regions_of_others(transfer):
    words = ("--from", "upper=b.png", "--from", "lower,hair=c.png", "--from-parsing", "b-map.png", "c-map.png")
    report = transfer(*MAP, *POSE, *words, "--from-pose", "b-pose.json", "--from-pose", "c-pose.json")
    features = transfer.features
    assert isinstance(features, CombinedFeatures)
    taken = [[], ["upper"], ["hair", "lower"]]
    expected = torch.tensor([[float(name in part) for name in REGION_NAMES] for part in taken])
    expected[0] = 1 - expected.sum(0)
    assert torch.equal(features.weights, expected)
    for (image, parsing, body, *_), name in zip(transfer.read, PEOPLE, strict=True):
        assert torch.equal(image, load_image(f"{name}.png"))
        assert same(parsing, HumanParsing.from_label_image(f"{name}-map.png"))
        assert torch.equal(body, body_tensor([person_of(f"{name}-pose.json")]))
    assert [each["picture"] for each in report["from"]] == ["b.png", "c.png"]
    assert report["from"][1]["regions"] == ["lower", "hair"]
    # In reading order or not, what is taken is the same.
    single = transfer(*MAP, *POSE, *DONOR)
    assert [each["parsing"] for each in single["from"]] == ["b-map.png"]


def test_a_donor_is_read_like_the_source(transfer):
    transfer("--parser", "schp-atr", "--estimate-pose", "--from", "skin=b.png")
    for (image, parsing, body, *_), name in zip(transfer.read, "ab", strict=True):
        assert torch.equal(image, load_image(f"{name}.png"))
        assert same(parsing, parse_image(image, choose_parser("schp-atr", ["models"], provider="CPU")))
        assert torch.equal(body, body_tensor([estimated(image)]))


def test_a_donor_of_another_size_is_fitted(transfer, scene):
    path, pose, person = scene
    donor = ("--from", f"upper={path}", "--from-pose", pose)
    transfer("--parser", "keypoints", *POSE, *donor)
    image, parsing, body = transfer.read[1][:3]
    assert image.shape[2:] == parsing.size == SIZE
    expected = fit_body(body_tensor([person])[0], (300, 220), SIZE[::-1])
    # Padding is in whole pixels of the photo.
    torch.testing.assert_close(body[0], expected, atol=1 / SIZE[1], rtol=0)
    transfer("--parser", "keypoints", *POSE, *donor, "--frame", "60x80")
    tall = [x[2][0, :, 1][x[2][0, :, 2] > 0] for x in transfer.read]
    assert [x[0].shape[2:] for x in transfer.read] == [(80, 60)] * 2
    spans = [float(x.max() - x.min()) for x in tall]
    assert spans[0] == pytest.approx(spans[1], rel=0.1)


def test_contradictory_regions_are_refused(transfer):
    both = ("--from", "upper,hair=b.png", "--from", "lower,upper=c.png")
    transfer.refused("upper is taken from both b.png and c.png; name each region once", *MAP, *both)
    transfer.refused("unknown region 'nose'", *MAP, "--from", "nose=b.png")
    for text in ("upper", "upper=", "=b.png"):
        transfer.refused(repr(text), *MAP, "--from", text)
    transfer.refused("need their human parsing too", *MAP, "--from", "upper=b.png")
    words = ("--from", "upper=b.png", "--from-parsing", "b-map.png", "c-map.png")
    transfer.refused("--from-parsing names 2 files for 1 --from pictures", *MAP, *words)
    transfer.refused("--from-pose names 1 files for 0", *MAP, "--from-pose", "b-pose.json")
    transfer.refused("needs the keypoints of b.png", "--parser", "keypoints", *POSE, "--from", "upper=b.png")
    transfer.refused("image gone.png does not exist", "--parser", "schp-atr", "--from", "upper=gone.png")


def test_a_donor_without_the_region_is_refused(transfer, tmp_path):
    labels = HumanParsing.from_label_image("b-map.png").labels()
    labels[labels == Region.UPPER] = Region.SKIN
    save_image(HumanParsing.from_labels(labels).preview(), tmp_path / "bare.png")
    words = ("--from", "lower,upper=b.png", "--from-parsing", tmp_path / "bare.png")
    transfer.refused("b.png shows none of upper, only background, face", *MAP, *words)


def test_a_donor_without_keypoints_is_said(transfer):
    notes = transfer(*MAP, *POSE, "--from", "upper=b.png", "--from-parsing", "b-map.png")["notes"]
    assert any("without keypoints of b.png" in note for note in notes)


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--parser keypoints (no model"),
        ((*MAP, "--parser", "schp-atr"), "both --parsing a-map.png and --parser schp-atr"),
        (("--parser", "keypoints"), "--parser keypoints needs the keypoints of SOURCE"),
        ((*MAP, "--retarget"), "--retarget needs the keypoints of SOURCE"),
        ((*MAP, "--retarget", "head"), "--retarget: invalid choice: 'head'"),
        ((*MAP, "--paste-back"), "--paste-back puts a framed picture back, and --frame was not given"),
        ((*MAP, "--frame", "--size", "64x64"), "leave out --size"),
        ((*MAP, "--frame", "large"), "--frame: 'large' is not WIDTHxHEIGHT"),
        ((*MAP, "--frame", "--paste-back", "-1"), "--paste-back"),
    ],
)
def test_options_that_do_not_fit_together(transfer, words, message):
    transfer.refused(message, *words)


def test_a_picture_as_pose_needs_to_be_asked_for(transfer):
    transfer.refused("--pose b.png is a picture; add --estimate-pose", *MAP, pose=("b.png",))

"""`truepose transfer` with models of other systems: from the published files to pictures, small and random."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import systems as fam
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from foreign import flat, ip_adapter
from importing.families.test_cfld import SMALL as SMALL_CFLD
from importing.families.test_cfld import infos, original, planned
from importing.families.test_cfld import model as cfld_model
from safetensors.torch import save_file

from truepose_core.body.person import lift_person
from truepose_core.body.pictures import CHAMP_MAPS
from truepose_core.body.reading import write_body
from truepose_core.cli import main
from truepose_core.cli.transfer.maps import load_beside
from truepose_core.models.cfld.model import load_cfld
from truepose_core.models.folder import load_image_encoder
from truepose_core.models.store import load_model
from truepose_core.pictures.files import load_image, save_image
from truepose_core.pipeline import TruePosePipeline
from truepose_core.pipeline.cfld import CFLDPipeline
from truepose_core.pose import body_tensor, write_pose
from truepose_core.pose.gallery import gallery_pose

CONVERTED = "converted.safetensors"
SYSTEMS = ("animate-anyone", "champ", "leffa", "cfld")
POSE = "gallery:walking"


def nets(reference: int = 1, denoising: int = 2) -> dict[str, dict]:
    """The two UNets of AnimateAnyone and champ."""
    return {
        "reference_unet": fam.without_output(fam.randomised(UNet2DConditionModel(**fam.SMALL), reference).state_dict()),
        "denoising_unet": fam.randomised(UNet2DConditionModel(**fam.SMALL), denoising).state_dict(),
    }


def leffa() -> dict[str, torch.Tensor]:
    parts = {
        "vae": AutoencoderKL(**fam.SMALL_VAE),
        "unet_encoder": UNet2DConditionModel(**fam.SMALL),
        "unet": UNet2DConditionModel(**fam.SMALL, in_channels=12),
    }
    return {
        f"{name}.{key}": x
        for seed, (name, part) in enumerate(parts.items())
        for key, x in fam.randomised(part, seed).state_dict().items()
    }


def cfld() -> tuple[dict, dict]:
    plan, state = planned(infos(*original(SMALL_CFLD))), cfld_model().state_dict()
    files: tuple[dict, dict] = ({}, {})
    for name, (file, key) in plan.tensors.items():
        files[file][key] = state[name]
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weight files in a folder per system, as published and converted, what they need beside, and pictures."""
    path = tmp_path_factory.mktemp("systems")
    for name in SYSTEMS:
        (path / name).mkdir()
    guider = fam.randomised(fam.pose_guider(32), 3).state_dict()
    fam.saved(path / "animate-anyone", **nets(), pose_guider=guider)
    encoders = {f"guidance_encoder_{x}": fam.randomised(fam.GuidanceEncoder(32), 4).state_dict() for x in ("a", "b")}
    fam.saved(path / "champ", **nets(), **encoders)
    fam.saved(path / "leffa", pose_transfer=leffa())
    fam.saved(path / "cfld", **dict(zip(("one", "two"), cfld(), strict=True)))
    for name in SYSTEMS:
        files = [str(path / name / file) for file in (*FILES[name], CONVERTED)]
        assert main(["convert", *files[:-1], *CHOICES.get(name, ()), "--out", files[-1], "--quiet"]) == 0
    fam.vae_folder(path / "vae")
    fam.image_encoder_folder(path / "clip")
    save_image(fam.picture(1), path / "person.png")
    save_image(fam.dressed().preview(), path / "person-map.png")
    for i, name in enumerate(("depth", "normal", "densepose", "canvas")):
        save_image(fam.picture(10 + i), path / f"{name}.png")
    mask = torch.zeros(1, 3, *fam.SIZE)
    mask[..., 16:48, 8:40] = 1
    save_image(mask, path / "mask.png")
    save_image(0 * mask, path / "black.png")
    save_image(fam.picture(1)[:, :, :32], path / "wide.png")
    (path / "fewer").mkdir()
    save_image(fam.picture(1), path / "fewer" / "walking.png")
    for i, name in enumerate(("depth", "normal")):
        (path / f"{name}s").mkdir()
        for j, pose in enumerate(("walking", "waving")):
            save_image(fam.picture(20 + 2 * i + j), path / f"{name}s" / f"{pose}.png")
    return path


FILES = {
    "animate-anyone": ("reference_unet.pth", "denoising_unet.pth", "pose_guider.pth"),
    "champ": ("reference_unet.pth", "denoising_unet.pth", "guidance_encoder_a.pth", "guidance_encoder_b.pth"),
    "leffa": ("pose_transfer.pth",),
    "cfld": ("two.pth", "one.pth"),
}
CHOICES = {"champ": ("--choose", "maps=depth,normal")}
BESIDE = {
    "animate-anyone": ("--vae", "vae", "--image-encoder", "clip"),
    "champ": ("--vae", "vae", "--image-encoder", "clip"),
    "leffa": (),
    "cfld": ("--vae", "vae"),
}
CONDITIONS = {
    "animate-anyone": ("--pose", POSE),
    "champ": ("--pose-map", "depth=depth.png", "normal=normal.png"),
    "leffa": ("--pose-map", "densepose=densepose.png"),
    "cfld": ("--pose", POSE),
}


SCALES = {
    name: dict(zip(("pose", "source", "rescale"), scales, strict=True)) | {"from": "as published"}
    for name, scales in zip(SYSTEMS, ((1, 3.5, 0), (1, 3.5, 0), (1, 2.5, 2.5), (2, 2, 0)), strict=True)
}


class Command:
    """`truepose transfer` in the folder."""

    def __init__(self, folder: Path, out: Path, capsys: pytest.CaptureFixture[str]):
        self.folder, self.out, self.capsys = folder, out, capsys

    def published(self, name: str) -> list[str]:
        """--model with the files as published."""
        return ["--model", *(f"{name}/{file}" for file in FILES[name]), *CHOICES.get(name, ())]

    def argv(self, name: str, *words: object, conditions: tuple | None = None, out: Path | None = None) -> list[str]:
        given = ["transfer", "person.png", *(CONDITIONS[name] if conditions is None else conditions)]
        given += [*BESIDE[name], "--out", out or self.out, "--steps", "1", "--device", "cpu", "--overwrite"]
        if "--model" not in words:
            given += ["--model", f"{name}/{CONVERTED}"]
        return [str(word) for word in (*given, *words)]

    def __call__(self, name: str, *words: object, **more) -> dict:
        """The report of a command that works."""
        code = main([*self.argv(name, *words, **more), "--json"])
        said = self.capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out)

    def picture(self, name: str, *words: object, **more) -> bytes:
        self(name, *words, **more)
        return self.out.read_bytes()

    def refused(self, message: str, *argv: str) -> None:
        """One line that says `message`, and no file."""
        code = main([str(word) for word in argv])
        said = self.capsys.readouterr()
        assert (code, said.out) == (2, ""), said.err
        (error,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert message in error
        assert not self.out.exists()


@pytest.fixture
def transfer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    monkeypatch.chdir(folder)
    return Command(folder, tmp_path / "result.png", capsys)


def library(name: str, file: str) -> torch.Tensor:
    """The picture that the pipeline makes with its own defaults."""
    image, body = load_image("person.png"), body_tensor(gallery_pose("walking", 64, 64).people)
    if name == "cfld":
        pipe = CFLDPipeline.from_model(load_cfld(file, vae="vae"))
        pipe.set_progress_bar_config(disable=True)
        return pipe(image, body, num_inference_steps=1).images
    vae = None if name == "leffa" else "vae"
    pipe = TruePosePipeline.from_model(
        load_model(file, vae=vae), image_encoder=None if name == "leffa" else load_image_encoder("clip")
    )
    pipe.set_progress_bar_config(disable=True)
    beside: dict[str, object] = {"pose_map": {}}
    if name == "champ":
        drawn = lift_person(body, (64, 64)).body.render(64, 64)
        beside["pose_map"] = {x: CHAMP_MAPS[x](drawn) for x in ("depth", "normal")}
    if name == "leffa":
        beside["pose_map"] = {"densepose": load_image("densepose.png")}
        beside |= {"canvas": load_image("canvas.png"), "mask": load_image("mask.png")[:, :1]}
    return pipe(image, body, fam.dressed(), num_inference_steps=1, **beside).images


@pytest.mark.parametrize("name", SYSTEMS)
def test_from_published_files_to_a_picture_as_inspect_says(transfer: Command, tmp_path: Path, name: str) -> None:
    file = tmp_path / "a model.safetensors"
    file.symlink_to(transfer.folder / name / CONVERTED)
    assert main(["inspect", str(file)]) == 0
    told = transfer.capsys.readouterr().out
    assert ("Load CFLD" in told) == (name == "cfld")
    assert main(["inspect", *transfer.published(name)[1:]]) == 0
    told += transfer.capsys.readouterr().out
    command, direct = re.findall(r"(?:command  |or as they are:) +(truepose transfer .+)", told)
    assert direct == command.replace(f"--model '{file}'", " ".join(transfer.published(name)))

    filled = {"SOURCE.png": "person.png", "POSE.json": POSE, "VAE_FOLDER": "vae", "CLIP_FOLDER": "clip"}
    filled |= {"CANVAS.png": "canvas.png", "MASK.png": "mask.png", "RESULT.png": str(transfer.out)}
    filled |= {f"{x}={x.upper()}.png": f"{x}={x}.png" for x in ("depth", "normal", "densepose")}
    made = []
    before = sorted(transfer.folder.rglob("*"))
    for line in (command, direct):
        words = [filled.get(word, word) for word in shlex.split(line)]
        assert main([*words[1:], "--steps", "1", "--device", "cpu", "--overwrite", "--json"]) == 0
        report = json.loads(transfer.capsys.readouterr().out)
        made.append(transfer.out.read_bytes())
        assert report["guidance"] == SCALES[name] and report["parsing"] is None
        assert report["outputs"][0]["pose"] == (POSE if "--pose" in words else None)
    wanted = library(name, f"{name}/{CONVERTED}")
    torch.testing.assert_close(load_image(transfer.out), wanted, atol=0.51 / 255, rtol=0)
    # The published files need no converted copy.
    assert made[0] == made[1] and sorted(transfer.folder.rglob("*")) == before
    assert report["model"] == ", ".join(f"{name}/{x}" for x in FILES[name])


# ---------------------------------------------------------------------------------------------------- guidance


def test_scales_that_are_given_are_taken_and_told(transfer: Command) -> None:
    assert transfer.picture("animate-anyone", "--guidance-source", 1) != transfer.picture("animate-anyone")
    assert transfer("leffa", "--guidance-source", 1.5)["guidance"] == {
        "pose": 1.0,
        "source": 1.5,
        "rescale": 1.5,
        "from": "as given",
    }
    assert main(transfer.argv("cfld", "--guidance-pose", 1)) == 0
    assert "guidance: pose 1, source 2 (as given)" in transfer.capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- maps


def test_folders_of_maps_are_as_many_poses(transfer: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = transfer("champ", "--batch", 2, "--steps", 2, conditions=FOLDERS, out=out)
    assert [Path(x["path"]).name for x in report["outputs"]] == ["walking.png", "waving.png"]
    assert report["outputs"][1]["maps"] == {"depth": "depths/waving.png", "normal": "normals/waving.png"}
    one = ("--pose-map", "depth=depths/waving.png", "normal=normals/waving.png")
    transfer("champ", "--steps", 2, conditions=one)
    torch.testing.assert_close(load_image(transfer.out), load_image(out / "waving.png"), atol=1.1 / 255, rtol=0)
    assert (load_image(out / "walking.png") - load_image(out / "waving.png")).abs().max() > 0.02
    # With poses, a folder's pictures go by their names, not by their order.
    report = transfer("champ", conditions=(*FOLDERS, "--pose", "gallery:waving", "gallery:walking"), out=out)
    assert [x["maps"]["depth"] for x in report["outputs"]] == ["depths/waving.png", "depths/walking.png"]


def test_keypoints_have_no_say_unless_regions_are_matched(transfer: Command) -> None:
    maps = ("--pose-map", "densepose=densepose.png")
    person = ("--pose", POSE, "--parsing", "person-map.png")
    alone = transfer.picture("leffa", conditions=maps)
    assert "no effect here" in " ".join(transfer("leffa", conditions=(*maps, *person))["notes"])
    assert transfer.out.read_bytes() == alone
    assert transfer.picture("leffa", "--beta", 4, conditions=(*maps, *person, "--strength", "0.5")) != alone


def test_a_map_can_be_left_out_and_a_skeleton_given(transfer: Command) -> None:
    both = transfer.picture("champ")
    assert transfer.picture("champ", conditions=("--pose-map", "depth=depth.png", "normal=none")) != both
    drawn = transfer.picture("animate-anyone")
    assert transfer.picture("animate-anyone", conditions=("--pose-map", "skeleton=depth.png")) != drawn


def test_maps_of_another_size_are_scaled_and_numbers_do_not_mix(tmp_path: Path) -> None:
    small = (np.random.default_rng(0).integers(0, 25, (3, 16, 32)) * 10) / 255
    save_image(torch.from_numpy(small).float(), tmp_path / "a.png")
    for size in ((24, 48), (16, 32), (10, 20)):
        made = load_beside(tmp_path / "a.png", "a map", size, numbers=True)
        assert made.shape == (1, 3, *size)
        assert set((made * 25.5).round(decimals=4).flatten().tolist()) <= set(range(25))
        assert load_beside(tmp_path / "a.png", "a map", size).shape == (1, 3, *size)


def test_champs_maps_are_drawn_from_a_pose_or_a_body(transfer: Command, tmp_path: Path) -> None:
    body = body_tensor(gallery_pose("walking", 64, 64).people)
    lifted = lift_person(body, (64, 64)).body
    for name, draw in CHAMP_MAPS.items():
        save_image(draw(lifted.render(64, 64)), tmp_path / f"{name}.png")
    as_pictures = ("--pose-map", f"depth={tmp_path / 'depth.png'}", f"normal={tmp_path / 'normal.png'}")
    wanted = transfer.picture("champ", conditions=as_pictures)
    posed = ("--pose", POSE)
    report = transfer("champ", conditions=posed)
    assert any("depth, normal: drawn from the poses' bodies" in note for note in report["notes"])

    def far(words: tuple[str, ...]) -> float:
        transfer.picture("champ", conditions=words)
        return float((load_image(transfer.out) - first).abs().max())

    transfer.out.write_bytes(wanted)
    first = load_image(transfer.out)
    # Pictures have eight bits.
    assert far(posed) < 0.02 and far((*posed, *as_pictures[:2])) < 0.02
    assert far((*posed, "--pose-map", "depth=depth.png")) > 0.02
    file = write_body(tmp_path / "walking.npz", lifted.pose, (64, 64))
    assert far(("--body", str(file))) < 0.02
    # A source whose keypoints are known gives its shape.
    (tmp_path / "source.json").write_text(json.dumps(write_pose(gallery_pose("standing", 64, 64))))
    known = ("--source-pose", str(tmp_path / "source.json"), "--parsing", "person-map.png")
    assert far((*posed, *known)) > 0
    transfer.out.unlink()
    for words, message in (
        (("--body", str(file), "--retarget"), "needs the keypoints of SOURCE"),
        (("--body", str(file), *known, "--retarget"), "--retarget moves keypoints, and --body is a body of its own"),
        (("--pose", POSE, "--smpl", "gone.npz"), "--smpl gone.npz does not exist"),
        ((*as_pictures, "--smpl", str(file)), "--smpl draws the pose maps of a body, and"),
        (("--body", "gone.npz"), "gone.npz does not exist"),
        (("--pose", str(_few(tmp_path))), "expected at least 5"),
    ):
        transfer.refused(message, *transfer.argv("champ", conditions=words))


def _few(folder: Path) -> Path:
    """A pose of one arm."""
    pose = write_pose(gallery_pose("walking", 64, 64))
    flat = pose[0]["people"][0]["pose_keypoints_2d"]
    pose[0]["people"][0]["pose_keypoints_2d"] = [v if 2 <= i // 3 <= 4 else 0 for i, v in enumerate(flat)]
    (folder / "arm.json").write_text(json.dumps(pose))
    return folder / "arm.json"


FOLDERS = ("--pose-map", "depth=depths", "normal=normals")


@pytest.mark.parametrize(
    ("name", "conditions", "message"),
    [
        ("champ", (), "depth, normal are missing; add --pose-map depth=PICTURE normal=PICTURE, or depth=none"),
        ("champ", ("--pose-map", "depth=depth.png"), "normal is missing; add --pose-map normal=PICTURE"),
        ("leffa", (), "densepose is missing; add --pose-map densepose=PICTURE"),
        ("champ", ("--pose-map", "skeleton=depth.png"), "reads no such map; it reads depth, normal"),
        ("animate-anyone", ("--pose", POSE, "--pose-map", "depth=depth.png"), "it reads skeleton"),
        ("champ", ("--pose-map", "depth"), "--pose-map 'depth' is not NAME=PICTURE"),
        ("champ", ("--pose-map", "depth=depth.png", "depth=normal.png"), "depth is given twice"),
        ("champ", ("--pose-map", "depth=none", "normal=none"), "every pose map is left out"),
        ("champ", ("--pose-map", "depth=gone.png", "normal=normal.png"), "gone.png does not exist"),
        ("champ", ("--pose-map", "depth=depths", "normal=normal.png"), "depth is a folder and normal is not"),
        ("champ", ("--pose-map", "depth=vae", "normal=normals"), "folder vae has no pictures"),
        ("champ", ("--pose-map", "depth=depths", "normal=fewer"), "folder fewer has no picture called waving"),
        ("champ", ("--pose-map", "depth=wide.png", "normal=normal.png"), "is 64x32 pixels and the picture that is"),
        ("champ", (*CONDITIONS["champ"], "--pose", POSE, "gallery:waving"), "there are 2 poses; give NAME=FOLDER"),
        ("champ", (*FOLDERS, "--pose", "gallery:waving", "gallery:sitting"), "no picture is called sitting"),
        ("animate-anyone", (), "--pose is missing: name the poses to show"),
        ("cfld", (), "--pose is missing: name the poses to show"),
        ("champ", (*CONDITIONS["champ"], "--retarget"), "--retarget needs the keypoints of SOURCE"),
        ("champ", (*CONDITIONS["champ"], "--person", "0"), "--person works on the keypoints of the pose"),
        ("champ", (*CONDITIONS["champ"], "--frame", "--paste-back"), "--canvas are pictures of their own"),
    ],
)
def test_wrong_maps_are_one_line(transfer: Command, tmp_path: Path, name: str, conditions: tuple, message: str) -> None:
    argv = transfer.argv(name, conditions=conditions, out=tmp_path / "out" if "gallery:waving" in conditions else None)
    transfer.refused(message, *argv)


# ---------------------------------------------------------------------------------------------------- canvas and mask


def test_a_canvas_and_its_mask_reach_the_model(
    transfer: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen, call = [], TruePosePipeline.__call__
    monkeypatch.setattr(TruePosePipeline, "__call__", lambda p, *a, **k: seen.append(k) or call(p, *a, **k))
    whole = transfer.picture("leffa")
    canvas = ("--canvas", "canvas.png", "--mask", "mask.png")
    filled = transfer.picture("leffa", *canvas)
    assert torch.equal(seen[1]["canvas"], load_image("canvas.png"))
    assert torch.equal(seen[1]["mask"], (load_image("mask.png").mean(1, keepdim=True) > 0.5).float())
    assert "canvas" not in seen[0] and "source_once" not in seen[0]
    once = transfer.picture("leffa", *canvas, "--source-once", "--steps", 2)
    assert seen[2]["source_once"] is True
    assert len({whole, filled, once}) == 3
    # The canvas says the size.
    save_image(torch.nn.functional.pad(load_image("canvas.png"), (0, 64)), tmp_path / "wide.png")
    save_image(torch.ones(1, 3, 32, 64), tmp_path / "mask.png")
    save_image(torch.zeros(1, 3, 16, 32), tmp_path / "pose.png")
    wide = ("--canvas", tmp_path / "wide.png", "--mask", tmp_path / "mask.png")
    report = transfer("leffa", *wide, conditions=("--pose-map", f"densepose={tmp_path / 'pose.png'}"))
    assert report["size"] == [128, 64] and report["canvas"] == str(tmp_path / "wide.png")


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("leffa", ("--canvas", "canvas.png"), "--canvas and --mask belong together"),
        ("leffa", ("--mask", "mask.png"), "--canvas and --mask belong together"),
        ("leffa", ("--canvas", "canvas.png", "--mask", "black.png"), "is black everywhere"),
        ("leffa", ("--from", "upper=person.png"), "reads its source anew at every step"),
        ("champ", ("--canvas", "canvas.png", "--mask", "mask.png"), "makes whole pictures"),
        ("champ", ("--source-once",), "reads the source once as it is"),
        ("champ", ("--region", "background=0"), "the source needs its human parsing"),
        ("champ", ("--beta", "2", "--parsing", "person-map.png"), "--beta works on the keypoints of the pose"),
        ("leffa", ("--vae", "vae"), "brings its own VAE; leave out --vae vae"),
        ("leffa", ("--image-encoder", "clip"), "reads no picture embedding"),
        ("cfld", ("--image-encoder", "clip"), "reads no picture embedding"),
        ("cfld", ("--pose-map", "depth=depth.png"), "--pose-map is not for a CFLD model"),
        ("cfld", ("--style", "0.5"), "--style is not for a CFLD model"),
        ("cfld", ("--canvas", "canvas.png", "--mask", "mask.png"), "--canvas is not for a CFLD model"),
        ("cfld", ("--source-once",), "--source-once is not for a CFLD model"),
        ("cfld", ("--from", "upper=person.png"), "--from is not for a CFLD model"),
        ("cfld", ("--region", "background=0"), "unless --strength is above 0"),
        ("cfld", ("--beta", "2"), "unless --strength is above 0"),
        ("cfld", ("--strength", "1"), "the source needs its human parsing"),
        ("cfld", ("--frame",), "neither a parsing nor keypoints were given"),
        ("cfld", ("--prompt", "x"), "--prompt is for Stable Diffusion folders"),
    ],
)
def test_options_that_a_model_does_not_read_are_refused(
    transfer: Command, name: str, words: tuple, message: str
) -> None:
    transfer.refused(message, *transfer.argv(name, *words))


# ---------------------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize("name", ["animate-anyone", "cfld"])
def test_parsing_is_for_what_reads_it(transfer: Command, name: str) -> None:
    parsing = ("--parsing", "person-map.png")
    assert transfer(name)["strength"] == (0 if name == "cfld" else 1)
    plain = transfer.out.read_bytes()
    assert transfer.picture(name, *parsing) == plain
    with_all = transfer.picture(name, *parsing, "--strength", 1)
    assert (with_all == plain) == (name != "cfld")
    assert transfer.picture(name, *parsing, "--strength", 1, "--region", "background=0") != with_all


def test_a_crop_that_suits_cfld(transfer: Command) -> None:
    report = transfer("cfld", "--frame", "--parsing", "person-map.png")
    # 11 : 16 of its 128 pixels.
    assert report["size"] == [88, 128]


# ---------------------------------------------------------------------------------------------------- files


def test_files_that_are_no_model_together(transfer: Command, tmp_path: Path) -> None:
    files = [f"animate-anyone/{file}" for file in FILES["animate-anyone"]]
    beside = ("--pose", POSE, *BESIDE["animate-anyone"], "--out", transfer.out, "--model")
    start = ("transfer", "person.png", *beside)
    transfer.refused("the pose guider is missing", *start, *files[:2])
    transfer.refused("which are the weight files of one system, and vae is no weight file", *start, files[0], "vae")
    transfer.refused("and bundled is no weight file", *start, "bundled", files[0])
    transfer.refused("no file at gone.pth", *start, "gone.pth")
    transfer.refused("look alike; say what each reads", *start, *(f"champ/{file}" for file in FILES["champ"]))
    transfer.refused("the choice 'maps' means nothing", *start, *files, "--choose", "maps=depth")
    transfer.refused("--choose is for weight files of other systems", *start, "bundled", "--choose", "maps=depth")
    save_file(flat(ip_adapter()), tmp_path / "adapter.safetensors")
    adapters = [str(tmp_path / f"{name}.safetensors") for name in ("adapter", "converted")]
    assert main(["convert", adapters[0], "--out", adapters[1], "--quiet"]) == 0
    transfer.capsys.readouterr()
    for adapter in adapters:
        transfer.refused("which goes on top of a model in ComfyUI and is none itself", *start, adapter)
    missing = [word for word in transfer.argv("animate-anyone") if word not in ("--image-encoder", "clip")]
    transfer.refused("reads a CLIP embedding of the source; name the folder", *missing)
    for name in ("animate-anyone", "cfld"):
        words = [word for word in transfer.argv(name) if word not in ("--vae", "vae")]
        transfer.refused("works on the latents of a VAE; name the folder that has it (--vae FOLDER)", *words)

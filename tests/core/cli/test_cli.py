"""The command line: what it answers, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from small import small_model

from truepose_core import __version__
from truepose_core.cli import COMMANDS, main
from truepose_core.cli.console import check_folder, memory_text, number, peak_memory, picture_size, to_json, whole
from truepose_core.cli.transfer.inputs import fit_body, unique_names
from truepose_core.errors import TruePoseError
from truepose_core.models.store import save_model
from truepose_core.pictures.files import load_image


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command line."""
    code = main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], *[[name, "--help"] for name in COMMANDS if name != "train"], ["demo"], ["fly"]]
)
def test_nothing_heavy_is_imported_before_a_command_runs(argv):
    code = (
        f"import sys; from truepose_core.cli import main; main({argv!r}); "
        "heavy = {'torch', 'numpy', 'PIL', 'diffusers'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_module_can_be_run():
    done = subprocess.run(
        [sys.executable, "-m", "truepose_core.cli", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"truepose {__version__}")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"truepose {command}" in out.split("examples:")[1]


def test_main_help_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND; see truepose --help"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo"], "required: --out; see truepose demo --help"),
        (["demo", "--out", "x", "--steps", "0"], "--steps: '0' is not a whole number of at least 1"),
        (["demo", "--out", "x", "--steps", "2.5"], "--steps: '2.5' is not a whole number"),
        (["demo", "--out", "x", "--seed", "-1"], "--seed: '-1' is not a whole number of at least 0"),
        (["demo", "--out", "x", "--sparkle"], "unrecognized arguments: --sparkle"),
        (["demo", "--out", "x", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["eval", "--data", "photos"], "--data: invalid choice: 'photos'"),
        (["eval", "--pairs", "none"], "--pairs: 'none' is not a whole number"),
        (["eval", "--model", "x.safetensors"], "--model 'x.safetensors' is not ROW=FILE"),
        (["eval", "--model", "a=1", "a=2"], "row 'a' is given twice"),
        (["train", "--out", "x", "--drop-all", "2"], "--drop-all: '2' is not a number of 0 to 1"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_console_types():
    assert whole(1)("7") == 7
    assert number(0, 1)("0.5") == 0.5
    assert picture_size("512x768") == (512, 768)
    for parse, text in (
        (whole(1), "x"),
        (number(), "nan"),
        (number(), "inf"),
        (picture_size, "5x5"),
        (picture_size, "9"),
    ):
        with pytest.raises(Exception, match=repr(text)):
            parse(text)
    assert json.loads(to_json({"a": float("nan"), "b": (1, 2.0)})) == {"a": None, "b": [1, 2.0]}
    memory = peak_memory(torch.device("cpu"))
    assert memory["peak_ram_mib"] > 10
    assert "MiB of RAM" in memory_text(memory)


def test_a_pose_is_fitted_without_distortion():
    body = torch.rand(18, 3)
    body[3] = 0
    for canvas, size in (((512, 512), (512, 768)), ((640, 480), (100, 333)), ((48, 64), (48, 64))):
        fitted = fit_body(body, canvas, size)
        shown = body[:, 2] > 0
        before = body[shown, :2] * torch.tensor(canvas)
        after = fitted[shown, :2] * torch.tensor(size)
        scale = min(size[0] / canvas[0], size[1] / canvas[1])
        centre = (torch.tensor(size) - scale * torch.tensor(canvas)) / 2
        torch.testing.assert_close(after, scale * before + centre, atol=1e-3, rtol=0)
        assert torch.equal(fitted[3], body[3])
    assert torch.allclose(fit_body(body, (48, 64), (480, 640)), body, atol=1e-6)


def test_names_of_pictures_are_unique():
    assert unique_names(["wave", "walk", "Wave", "wave-2", "wave"]) == [
        "wave.png",
        "walk.png",
        "Wave-2.png",
        "wave-2-2.png",
        "wave-3.png",
    ]


def test_check_folder_makes_nothing(tmp_path):
    paths = check_folder(tmp_path / "a" / "b", ["x.png"], overwrite=False)
    assert paths == [tmp_path / "a" / "b" / "x.png"]
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TruePoseError, match="is a file"):
            check_folder(folder, ["x.png"], overwrite=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The file of a small random model."""
    return save_model(small_model(), tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def demo(tiny, tmp_path_factory):
    """A folder where the demo has run."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert main(["demo", "--out", str(out), "--model", str(tiny), "--steps", "1", "--device", "cpu"]) == 0
    return out


def test_demo_writes_a_sheet_its_figures_and_inputs(demo):
    report = json.loads((demo / "demo.json").read_text())
    assert len(report["pairs"]) == 8
    for pair in report["pairs"]:
        assert 0 < pair["foreground_psnr"] < 60
        assert 0 < pair["copy_foreground_psnr"] < 60
        assert pair["seconds"] > 0
    mean = sum(pair["foreground_psnr"] for pair in report["pairs"]) / 8
    assert report["mean"]["foreground_psnr"] == pytest.approx(mean)
    assert report["peak_ram_mib"] < 3000
    sheet = load_image(demo / "demo.png")
    assert sheet.shape[3] > 1000
    assert len(list((demo / "inputs").glob("*.json"))) == 11
    assert sorted(p.name for p in demo.iterdir()) == ["demo.json", "demo.png", "inputs"]


def test_demo_psnr_is_the_evaluations():
    from truepose_core.cli.demo import foreground_psnr
    from truepose_core.evaluation.metrics import masked_psnr

    a, b = torch.rand(2, 2, 3, 16, 12)
    mask = torch.rand(2, 16, 12) > 0.5
    assert foreground_psnr(a, b, mask) == pytest.approx(masked_psnr(a, b, mask).tolist())


def test_demo_keeps_what_is_there(capsys, demo, tiny):
    before = (demo / "demo.png").read_bytes()
    code, _, err = run(capsys, "demo", "--out", demo, "--model", tiny, "--steps", "1")
    assert code == 2
    assert "demo.png exists already and is kept; choose another path, or add --overwrite" in err
    assert (demo / "demo.png").read_bytes() == before


class Transfer:
    """Builds command lines for `truepose transfer` around the demo's inputs."""

    def __init__(self, demo, tiny, folder):
        self.inputs, self.tiny, self.folder = demo / "inputs", tiny, folder
        self.out = folder / "result.png"

    def argv(self, *more, source=None, parsing=None, pose=("wave.json",), out=None, model=None, steps=1):
        words = ["transfer", str(source or self.inputs / "person.png"), "--device", "cpu", "--steps", str(steps)]
        words += ["--parsing", str(parsing or self.inputs / "person-parsing.png")]
        words += ["--pose", *(str(self.inputs / p) for p in pose)]
        words += ["--out", str(out or self.out), "--model", str(model or self.tiny)]
        return [*words, *map(str, more)]


@pytest.fixture
def transfer(demo, tiny, tmp_path):
    return Transfer(demo, tiny, tmp_path)


def test_one_pose_gives_one_picture_of_the_sources_size(capsys, transfer):
    code, out, err = run(capsys, *transfer.argv("--source-pose", transfer.inputs / "person-pose.json"))
    assert code == 0
    assert load_image(transfer.out).shape == (1, 3, 256, 192)
    assert f"wrote {transfer.out} (192x256)" in out
    assert "peak memory" in out
    assert "knows mannequins only" in err


def test_many_poses_give_a_folder_and_one_source_pass(capsys, transfer, monkeypatch):
    from truepose_core.models.model import TruePoseModel

    passes = []
    encode = TruePoseModel.encode_source
    monkeypatch.setattr(TruePoseModel, "encode_source", lambda *a, **k: passes.append(1) or encode(*a, **k))
    out = transfer.folder / "some" / "results"
    poses = ("wave.json", "walk.json", "sit.json")
    argv = transfer.argv("--json", "--batch", 2, "--size", "80x100", "--seed", 5, pose=poses, out=out)
    code, text, _ = run(capsys, *argv)
    assert code == 0
    report = json.loads(text)
    assert [entry["path"] for entry in report["outputs"]] == [str(out / f"{p[:-5]}.png") for p in poses]
    assert report["size"] == [80, 100]
    assert report["seconds"]["total"] >= report["seconds"]["sampling"] > 0
    assert report["peak_ram_mib"] > 0
    assert any("mannequins only" in note for note in report["notes"])
    assert len(passes) == 1
    for entry in report["outputs"]:
        assert load_image(entry["path"]).shape == (1, 3, 100, 80)
    # A picture depends on its own pose and the seed, not on the others.
    single = transfer.folder / "walk.png"
    assert main(transfer.argv("--size", "80x100", "--seed", 5, pose=("walk.json",), out=single)) == 0
    difference = (load_image(single) - load_image(out / "walk.png")).abs().max()
    assert difference <= 1 / 255 + 1e-6


def test_frames_of_one_file_are_numbered(capsys, transfer):
    frames = [json.loads((transfer.inputs / f"{name}.json").read_text())[0] for name in ("wave", "walk")]
    both = transfer.folder / "both.json"
    both.write_text(json.dumps(frames))
    code, _, _ = run(capsys, *transfer.argv(pose=(both,), out=transfer.folder / "out"))
    assert code == 0
    assert sorted(p.name for p in (transfer.folder / "out").iterdir()) == ["both-0.png", "both-1.png"]


def test_the_same_command_gives_the_same_bytes(transfer):
    other = transfer.folder / "again.png"
    assert main(transfer.argv("--seed", 3, "--guidance-pose", 1.5, "--guidance-source", 2)) == 0
    assert main(transfer.argv("--seed", 3, "--guidance-pose", 1.5, "--guidance-source", 2, out=other)) == 0
    assert transfer.out.read_bytes() == other.read_bytes()
    assert (
        main(transfer.argv("--seed", 4, "--guidance-pose", 1.5, "--guidance-source", 2, "--overwrite", out=other)) == 0
    )
    assert transfer.out.read_bytes() != other.read_bytes()


def test_options_that_change_the_picture_reach_the_model(transfer):
    pose = ("--source-pose", transfer.inputs / "person-pose.json")

    def picture(*options):
        assert main(transfer.argv("--overwrite", *pose, *options)) == 0
        return transfer.out.read_bytes()

    plain = picture()
    for options in (
        ("--strength", 0),
        ("--region", "face=0", "upper=0.5"),
        ("--beta", 0),
        ("--gamma", 100),
        ("--guidance-source", 2),
        ("--steps", 2),
        ("--dtype", "bfloat16"),
    ):
        assert picture(*options) != plain, options
    assert picture("--region", "face=1", "--region", "upper=1") == plain
    pose = ()
    assert picture() != plain


def test_body_match_without_a_source_pose_is_said(capsys, transfer):
    code, _, err = run(capsys, *transfer.argv("--gamma", 8))
    assert code == 0
    assert "--gamma has no effect without --source-pose" in err


def saved(folder, name, image, **options):
    path = folder / name
    image.save(path, **options)
    return path


def variants(person, folder):
    """Pictures that are unusual and must work: name -> file."""
    grey16 = Image.fromarray(np.asarray(person.convert("L")).astype(np.uint16) * 257)
    turned = person.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = person.convert("RGBA")
    alpha.putalpha(128)
    return {
        "grey": saved(folder, "grey.png", person.convert("L")),
        "alpha": saved(folder, "alpha.png", alpha),
        "16-bit": saved(folder, "16.png", grey16),
        "cmyk": saved(folder, "cmyk.jpg", person.convert("CMYK")),
        "exif": saved(folder, "exif.jpg", turned, exif=exif),
    }


@pytest.mark.parametrize("kind", ["grey", "alpha", "16-bit", "cmyk", "exif"])
def test_unusual_pictures_work(transfer, kind):
    person = Image.open(transfer.inputs / "person.png")
    source = variants(person, transfer.folder)[kind]
    assert main(transfer.argv(source=source)) == 0
    assert load_image(transfer.out).shape == (1, 3, 256, 192)


@pytest.mark.parametrize(("labels", "size"), [("grey", (192, 256)), ("grey", (96, 128)), ("atr", (192, 256))])
def test_label_maps_in_grey_of_another_scale_and_of_a_parser_work(capsys, transfer, labels, size):
    ours = np.zeros((256, 192), np.uint8)
    ours[20:60, 70:120], ours[60:140, 60:130], ours[140:240, 70:120] = 1, 3, 4
    options = []
    if labels == "atr":
        ours = np.array([0, 11, 2, 4, 6, 14, 1], np.uint8)[ours]
        options = ["--parsing-labels", "atr"]
    map_file = saved(transfer.folder, "map.png", Image.fromarray(ours).resize(size, Image.Resampling.NEAREST))
    code, _, err = run(capsys, *transfer.argv(*options, parsing=map_file))
    assert code == 0
    assert ("scaled to the source's 192x256" in err) == (size != (192, 256))


def png_header(width, height):
    """A PNG that says it is this large and holds nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def bad_pictures(person):
    """name -> (bytes or None for no file, what the message says)."""
    import io

    def encoded(kind):
        buffer = io.BytesIO()
        person.save(buffer, kind)
        return buffer.getvalue()

    png, jpeg = encoded("PNG"), encoded("JPEG")
    small = io.BytesIO()
    person.resize((1, 1)).save(small, "PNG")
    return {
        "missing": (None, "does not exist"),
        "text": (b"this is no picture", "not an image that can be read"),
        "cut.png": (png[: len(png) // 2], "damaged or incomplete"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "damaged or incomplete"),
        "empty": (b"", "empty (0 bytes)"),
        "1x1": (small.getvalue(), "is 1x1 pixels; expected at least 16"),
        "bomb": (png_header(60000, 60000), "too large"),
        "wide": (png_header(20000, 100), "too large"),
    }


@pytest.mark.parametrize("name", ["missing", "text", "cut.png", "cut.jpg", "empty", "1x1", "bomb", "wide"])
@pytest.mark.parametrize("which", ["source", "parsing"])
def test_bad_pictures_are_refused(capsys, transfer, name, which):
    data, message = bad_pictures(Image.open(transfer.inputs / "person.png").convert("RGB"))[name]
    path = transfer.folder / f"given-{name}"
    if data is not None:
        path.write_bytes(data)
    refused(capsys, transfer, transfer.argv(**{which: path}), message, path)


def refused(capsys, transfer, argv, message, *names):
    """The command ends with one line that says `message` and the names, and leaves no file."""
    before = sorted(transfer.folder.rglob("*"))
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert message in errors[0]
    for name in names:
        assert str(name) in errors[0]
    assert sorted(transfer.folder.rglob("*")) == before


def person_json(**changes):
    """One frame with one visible person; changes: keypoint number -> (x, y, c)."""
    points = [[100 + 4 * i, 80 + 8 * i, 1] for i in range(18)]
    for index, value in changes.items():
        points[int(index[1:])] = list(value)
    return {"pose_keypoints_2d": [x for point in points for x in point]}


def frame_json(*people):
    return json.dumps([{"canvas_width": 192, "canvas_height": 256, "people": list(people)}])


POSES = {
    "missing": (None, "cannot be read"),
    "empty": ("", "is empty"),
    "not json": ("{", "not valid JSON"),
    "number": ("5", "is a int"),
    "no people key": ('{"faces": []}', 'expected a dictionary with "people"'),
    "short": (json.dumps({"people": [{"pose_keypoints_2d": [1, 2, 3]}]}), "has 3 values"),
    "words": (frame_json({"pose_keypoints_2d": ["a"] * 54}), "holds 'a'; expected three numbers"),
    "nobody": (frame_json(), "the pose has no person"),
    "invisible": (frame_json({"pose_keypoints_2d": [0] * 54}), "no body keypoint is visible"),
    "nan": (frame_json(person_json(k4=(float("nan"), 1, 1))), "body keypoint 4 (r_wrist)"),
    "far out": (frame_json(person_json(k4=(1e6, 1, 1))), "body keypoint 4 (r_wrist)"),
    "beside": (frame_json({"pose_keypoints_2d": [-50, -50, 1] * 18}), "lie outside the 192x256 picture"),
}


@pytest.mark.parametrize("name", POSES)
@pytest.mark.parametrize("option", ["--pose", "--source-pose"])
def test_bad_poses_are_refused(capsys, transfer, name, option):
    text, message = POSES[name]
    if option == "--source-pose" and name == "beside":
        pytest.skip("a source may be cut by its picture's border")
    path = transfer.folder / "given.json"
    if text is not None:
        path.write_text(text)
    argv = transfer.argv(pose=(path,)) if option == "--pose" else transfer.argv("--source-pose", path)
    refused(capsys, transfer, argv, message, path)


def test_of_several_people_the_largest_is_taken_and_said(capsys, transfer):
    small = {"pose_keypoints_2d": [x for i in range(18) for x in (20 + i, 20 + i, 1)]}
    path = transfer.folder / "two.json"
    path.write_text(frame_json(small, person_json()))
    code, _, err = run(capsys, *transfer.argv(pose=(path,)))
    assert code == 0
    assert f"note: pose file {path} has 2 people; taking person 1, the largest. Choose with --person N, 0 to 1" in err
    largest = transfer.out.read_bytes()
    code, _, err = run(capsys, *transfer.argv("--person", 1, "--overwrite", pose=(path,)))
    assert code == 0
    assert "2 people" not in err
    assert transfer.out.read_bytes() == largest
    transfer.out.unlink()
    refused(capsys, transfer, transfer.argv("--person", 2, pose=(path,)), "expected an index from 0 to 1", path)
    refused(capsys, transfer, transfer.argv("--source-person", 1), "--source-person needs the keypoints of SOURCE")


def test_a_pose_mostly_outside_is_said(capsys, transfer):
    outside = {f"k{i}": (250, 300, 1) for i in range(12)}
    path = transfer.folder / "outside.json"
    path.write_text(frame_json(person_json(**outside)))
    code, _, err = run(capsys, *transfer.argv(pose=(path,)))
    assert code == 0
    assert "12 of 18 keypoints" in err


def test_a_pose_without_canvas_is_on_the_output(transfer):
    frame = json.loads((transfer.inputs / "wave.json").read_text())[0]
    path = transfer.folder / "bare.json"
    path.write_text(json.dumps({"people": frame["people"]}))
    other = transfer.folder / "other.png"
    assert main(transfer.argv(pose=(path,))) == 0
    assert main(transfer.argv(out=other)) == 0
    assert transfer.out.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--region", "nose=1"), "unknown region 'nose'; the regions are background, face"),
        (("--region", "face"), "region weight 'face' is not NAME=WEIGHT"),
        (("--region", "face=2"), "the weight of region 'face' is 2.0; expected a number from 0"),
        (("--region", "face=1", "--region", "face=0"), "region 'face' is given twice"),
        (("--size", "512"), "--size: '512' is not WIDTHxHEIGHT"),
        (("--size", "8x900"), "--size: '8x900' is out of bounds; each side may be 16 to 4096 pixels"),
        (("--strength", "2"), "--strength: '2' is not a number of 0 to 1"),
        (("--guidance-pose", "-1"), "--guidance-pose: '-1' is not a number of 0 or more"),
        (("--guidance-source", "nan"), "--guidance-source: 'nan' is not a number of 0 or more"),
        (("--beta", "x"), "--beta: 'x' is not a number"),
        (("--device", "toaster"), "--device toaster cannot be used here"),
        (("--device", "meta"), "--device meta computes nothing"),
        (("--parsing-labels", "mine"), "unknown label set 'mine'; known are regions, atr"),
        (("--prompt", "a person"), "--prompt is for Stable Diffusion folders"),
        (("--controlnet", "x"), "--controlnet is for Stable Diffusion folders"),
    ],
)
def test_bad_options_are_refused(capsys, transfer, options, message):
    refused(capsys, transfer, transfer.argv(*options), message)


def test_without_parsing_the_error_says_how_to_get_one(capsys, transfer):
    argv = transfer.argv()
    at = argv.index("--parsing")
    refused(capsys, transfer, argv[:at] + argv[at + 2 :], "the source needs its human parsing; give one of --parser")


def test_bad_label_maps_are_refused(capsys, transfer):
    def given(name, array):
        return saved(transfer.folder, name, Image.fromarray(array))

    smooth = Image.open(transfer.inputs / "person-parsing.png").resize((190, 250)).resize((192, 256))
    cases = [
        (given("zero.png", np.zeros((256, 192), np.uint8)), "shows nobody"),
        (given("nine.png", np.full((256, 192), 9, np.uint8)), "expected labels 0 to 6"),
        (given("other.png", np.ones((192, 256), np.uint8)), "of the same shape"),
        (saved(transfer.folder, "smooth.png", smooth), "Save it as PNG, without smoothing"),
    ]
    for path, message in cases:
        refused(capsys, transfer, transfer.argv(parsing=path), message, path)


def test_source_pose_of_another_picture_is_refused(capsys, transfer):
    path = transfer.folder / "wide.json"
    path.write_text(json.dumps({"canvas_width": 512, "canvas_height": 512, "people": [person_json()]}))
    refused(capsys, transfer, transfer.argv("--source-pose", path), "canvas of 512x512 and the source is 192x256", path)


def test_bad_models_are_refused(capsys, transfer):
    from safetensors.torch import save_file

    lora, cut, gone = (transfer.folder / f"{name}.safetensors" for name in ("lora", "cut", "gone"))
    save_file({"lora.weight": torch.zeros(2)}, lora)
    cut.write_bytes(transfer.tiny.read_bytes()[:5000])
    refused(capsys, transfer, transfer.argv(model=lora), "holds another architecture", lora)
    refused(capsys, transfer, transfer.argv(model=cut), "not a complete safetensors file", cut)
    refused(capsys, transfer, transfer.argv(model=gone), "no model file at", gone)
    refused(capsys, transfer, transfer.argv(model=transfer.folder), "has no config.json", transfer.folder)


def test_bad_outputs_are_refused_before_any_work(capsys, transfer, monkeypatch):
    monkeypatch.setattr("truepose_core.cli.transfer.command.open_model", lambda *_: pytest.fail("the model was opened"))
    two = ("wave.json", "walk.json")
    file = transfer.folder / "file"
    file.write_text("mine")
    cases = [
        (transfer.argv(out=transfer.folder / "a.txt"), "has the suffix '.txt'; expected one of .png"),
        (transfer.argv(out=transfer.folder / "no" / "a.png"), "does not exist; create it first"),
        (transfer.argv(out=file / "a.png"), str(file)),
        (transfer.argv(out=transfer.folder), "is a folder, and there is one pose in all; give the picture's path"),
        (transfer.argv(pose=two), "is one picture's name, and there are 2 poses; give a folder"),
        (transfer.argv(pose=two, out=file), "is a file; expected a folder"),
    ]
    if sys.platform == "linux":
        cases.append((transfer.argv(out="/proc/result.png"), "output /proc/result.png cannot be written"))
        cases.append((transfer.argv(pose=two, out="/proc/results"), "output /proc/results cannot be written"))
    for argv, message in cases:
        refused(capsys, transfer, argv, message)
    assert file.read_text() == "mine"


def test_an_existing_output_is_kept_unless_asked(capsys, transfer):
    transfer.out.write_bytes(b"mine")
    refused(capsys, transfer, transfer.argv(), "exists already and is kept; choose another path, or add --overwrite")
    assert transfer.out.read_bytes() == b"mine"
    folder = transfer.folder / "results"
    folder.mkdir()
    (folder / "walk.png").write_bytes(b"mine")
    refused(capsys, transfer, transfer.argv(pose=("wave.json", "walk.json"), out=folder), "walk.png exists already")
    assert main(transfer.argv("--overwrite")) == 0
    assert load_image(transfer.out).shape == (1, 3, 256, 192)


@pytest.mark.parametrize("command", ["transfer", "demo"])
def test_ctrl_c_in_the_middle_leaves_nothing(capsys, transfer, monkeypatch, command):
    from truepose_core.models.model import TruePoseModel

    denoise = TruePoseModel.denoise
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return denoise(*args, **kwargs)

    monkeypatch.setattr(TruePoseModel, "denoise", interrupted)
    argv = transfer.argv(steps=4)
    if command == "demo":
        argv = ["demo", "--out", transfer.folder / "demo", "--model", transfer.tiny, "--steps", 4, "--device", "cpu"]
    code, out, err = run(capsys, *argv)
    assert (code, out) == (130, "")
    assert "stopped by Ctrl-C" in err
    assert not list(transfer.folder.iterdir())


def test_out_of_memory_says_what_to_do(capsys, transfer, monkeypatch):
    from truepose_core.models.model import TruePoseModel

    def hungry(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(TruePoseModel, "denoise", hungry)
    refused(capsys, transfer, transfer.argv(), "not enough memory on cpu for this; try a smaller --size")


def test_demo_refuses_other_models(capsys, tmp_path):
    model = save_model(small_model("none", caa=False, family="sd15"), tmp_path / "other.safetensors")
    code, _, err = run(capsys, "demo", "--out", tmp_path / "demo", "--model", model)
    assert code == 2
    assert "the demo shows mannequins" in err
    assert not (tmp_path / "demo").exists()


def test_eval_prints_a_table_and_writes_it(capsys, tiny, tmp_path):
    pytest.importorskip("torchmetrics")
    table, sheet = tmp_path / "table.json", tmp_path / "sheet.png"
    argv = ["eval", "--pairs", 2, "--rows", "copy", "mine", "--model", f"mine={tiny}", "--steps", 1, "--device", "cpu"]
    code, out, _ = run(capsys, *argv, "--report", table, "--sheet", sheet)
    assert code == 0
    assert "| row | foreground PSNR" in out
    assert [row["name"] for row in json.loads(table.read_text())["rows"]] == ["copy", "mine"]
    assert load_image(sheet).shape[2] > 400
    code, _, err = run(capsys, *argv, "--report", table)
    assert code == 2
    assert "table.json exists already and is kept" in err
    code, _, err = run(capsys, "eval", "--rows", "magic", "--pairs", 1)
    assert code == 2
    assert "unknown row 'magic'" in err


def test_benchmark_is_handed_its_options(capsys, monkeypatch, tmp_path):
    import truepose_core.benchmark

    seen = []
    monkeypatch.setattr(truepose_core.benchmark, "run", lambda args, say: seen.append(args) or {})
    code, out, _ = run(capsys, "benchmark", "--report", tmp_path / "b.json", "--quick")
    assert code == 0
    assert f"wrote {tmp_path / 'b.json'}" in out
    assert seen[0].quick

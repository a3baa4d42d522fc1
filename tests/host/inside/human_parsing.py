"""Human Parsing and Edit Parsing, called as the host calls them."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from pack.nodes import TruePoseExtension, human_parsing
from pack.nodes.host import files as host_files
from pack.nodes.host.unet import say_once
from pack.nodes.human_parsing import DOWNLOAD, KEYPOINTS, MERGED, HumanParsingNode
from pack.nodes.mannequin import Mannequin
from pack.nodes.model import LoadModel
from pack.nodes.parsing import EditParsing
from pack.nodes.schema import read_bodies, to_core

from truepose_core.errors import TruePoseError
from truepose_core.networks import known
from truepose_core.parsing import onnx as onnx_parser
from truepose_core.parsing.from_keypoints import parse_from_keypoints
from truepose_core.regions import REGION_NAMES, Region

FOLDER = Path(folder_paths.get_folder_paths("truepose")[0])


def run(node: type, **inputs: object) -> tuple:
    return node.execute(**inputs).result


class Network:
    """Stands for an ONNX session: dark pixels are background, bright ones upper clothes."""

    provider = "CPU"

    def __init__(self, path: Path, labels: int, side: int) -> None:
        self.path, self.labels = Path(path), labels
        self.inputs = {"picture": (1, 3, side, side)}
        self.outputs = {"scores": (1, labels, None, None)}
        self.runs = 0

    def run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.runs += 1
        bright = arrays["picture"].mean(1)
        scores = np.zeros((len(bright), self.labels, *bright.shape[1:]), np.float32)
        scores[:, 0], scores[:, 4 if self.labels == 18 else 5] = -20 * bright, 20 * bright
        return {"scores": scores[:, :, ::4, ::4]}


@pytest.fixture
def parsers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Network]:
    """models/truepose with SCHP's two files, and networks in their place."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    networks = {
        "parsing_atr.onnx": Network(FOLDER / "parsing_atr.onnx", 18, 512),
        "parsing_lip.onnx": Network(FOLDER / "parsing_lip.onnx", 20, 473),
    }
    for network in networks.values():
        network.path.write_bytes(b"")
    monkeypatch.setattr(onnx_parser, "open_session", lambda path, provider: networks[Path(path).name])
    for module in (onnx_parser, human_parsing):
        monkeypatch.setattr(module, "check_runtime", lambda provider: None)
    yield networks
    for network in networks.values():
        network.path.unlink()


@pytest.fixture
def photo() -> torch.Tensor:
    """A bright square on black: IMAGE [1, 60, 40, 3]."""
    image = torch.zeros(1, 60, 40, 3)
    image[:, 15:45, 10:30] = 1.0
    return image


def options() -> list[str]:
    return HumanParsingNode.define_schema().inputs[1].options


def test_the_list_shows_keypoints_files_and_what_could_be_fetched(parsers: dict) -> None:
    (FOLDER / "sub").mkdir(exist_ok=True)
    (FOLDER / "sub" / "own.onnx").write_bytes(b"")
    (FOLDER / "dw-ll_ucoco_384.onnx").write_bytes(b"")
    (FOLDER / "model.safetensors").write_bytes(b"")
    try:
        own = str(Path("sub") / "own.onnx")
        assert options() == [
            *(KEYPOINTS, MERGED, "parsing_atr.onnx", "parsing_lip.onnx", own),
            f"segformer-b2-clothes{DOWNLOAD}",
        ]
        files = LoadModel.define_schema().inputs[0].options
        assert "model.safetensors" in files and not [name for name in files if name.endswith(".onnx")]
    finally:
        (FOLDER / "sub" / "own.onnx").unlink()
        (FOLDER / "dw-ll_ucoco_384.onnx").unlink()
        (FOLDER / "model.safetensors").unlink()
    names = [node.GET_SCHEMA().node_id for node in asyncio.run(TruePoseExtension().get_node_list())]
    assert {"TruePoseHumanParsing", "TruePoseEditParsing"} <= set(names)


def test_extra_model_paths_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_paths.add_model_folder_path("truepose", str(tmp_path))
    try:
        (tmp_path / "parsing_lip.onnx").write_bytes(b"")
        assert "parsing_lip.onnx" in options() and f"schp-lip{DOWNLOAD}" not in options()
        assert known.find("schp-lip", host_files.folders()) == tmp_path / "parsing_lip.onnx"
    finally:
        folder_paths.folder_names_and_paths["truepose"][0].remove(str(tmp_path))
        folder_paths.filename_list_cache.clear()


@pytest.mark.parametrize("parser", ["parsing_atr.onnx", f"schp-atr{DOWNLOAD}", MERGED])
def test_a_network_gives_parsing_mask_preview_and_info(parsers: dict, photo: torch.Tensor, parser: str) -> None:
    parsing, mask, preview, info = run(HumanParsingNode, image=photo.expand(3, -1, -1, -1), parser=parser)
    assert parsing.masks.shape == (3, 7, 60, 40)
    assert preview.shape == (3, 60, 40, 3) and mask.shape == (3, 60, 40)
    inside = photo[0, :, :, 0] > 0.5
    assert ((mask[0] > 0.5) == inside).float().mean() > 0.95
    assert (parsing.labels()[0][inside] == Region.UPPER).float().mean() > 0.95
    assert parsers["parsing_atr.onnx"].runs == 3
    assert "parsing_atr.onnx (as schp-atr) on CPU" in info and "upper" in info
    assert ("parsing_lip.onnx" in info) == (parser == MERGED)


def test_the_mask_covers_what_is_chosen(parsers: dict, photo: torch.Tensor) -> None:
    choose = dict.fromkeys(REGION_NAMES, False)
    parsing, mask, _, _ = run(
        HumanParsingNode, image=photo, parser="parsing_atr.onnx", **{**choose, "background": True}
    )
    torch.testing.assert_close(mask, parsing.mask("background"))
    _, none, _, _ = run(HumanParsingNode, image=photo, parser="parsing_atr.onnx", **choose)
    assert not none.any()


def test_memory_is_freed_when_asked(parsers: dict, photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(human_parsing, "close_sessions", lambda: closed.append(1))
    run(HumanParsingNode, image=photo, parser="parsing_atr.onnx")
    assert not closed
    run(HumanParsingNode, image=photo, parser="parsing_atr.onnx", keep_loaded=False)
    assert closed


def test_nobody_is_an_error_and_some_a_warning(
    parsers: dict, photo: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TruePoseError, match=r"nobody is found in the image \(parsing_atr.onnx"):
        run(HumanParsingNode, image=torch.zeros_like(photo), parser="parsing_atr.onnx")
    with caplog.at_level(logging.WARNING):
        run(HumanParsingNode, image=torch.cat([photo, torch.zeros_like(photo)]), parser="parsing_atr.onnx")
    assert "nobody in pictures 1 of the batch" in caplog.text


# --------------------------------------------------------------------------------------------- what is not there


@pytest.mark.parametrize("parser", [f"schp-atr{DOWNLOAD}", MERGED])
def test_a_missing_parser_says_which_file_to_put_where(photo: torch.Tensor, parser: str) -> None:
    with pytest.raises(TruePoseError, match="switch download on") as caught:
        run(HumanParsingNode, image=photo, parser=parser)
    assert str(FOLDER / "parsing_atr.onnx") in str(caught.value)


def test_download_fetches_what_is_missing_into_the_folder(photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(model: known.KnownModel, folder: Path, *, progress: known.Progress) -> Path:
        progress(1, 2)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / model.file).write_bytes(b"")
        return folder / model.file

    monkeypatch.setattr(known, "download", download)
    monkeypatch.setattr(onnx_parser, "open_session", lambda path, provider: Network(path, 18, 512))
    try:
        parsing, *_ = run(HumanParsingNode, image=photo, parser=f"schp-atr{DOWNLOAD}", download=True)
        assert parsing.mask("upper").any() and (FOLDER / "parsing_atr.onnx").is_file()
        assert f"schp-atr{DOWNLOAD}" not in options()
        assert HumanParsingNode.validate_inputs(parser=f"schp-atr{DOWNLOAD}") is True
    finally:
        (FOLDER / "parsing_atr.onnx").unlink()


def test_a_choice_that_is_nowhere_is_refused() -> None:
    assert "there is no parser 'gone.onnx'" in HumanParsingNode.validate_inputs(parser="gone.onnx")
    assert HumanParsingNode.validate_inputs(parser=KEYPOINTS) is True


def test_a_changed_file_runs_again(parsers: dict) -> None:
    before = HumanParsingNode.fingerprint_inputs(parser="parsing_atr.onnx")
    assert before == HumanParsingNode.fingerprint_inputs(parser=f"schp-atr{DOWNLOAD}")
    (FOLDER / "parsing_atr.onnx").write_bytes(b"12")
    assert before != HumanParsingNode.fingerprint_inputs(parser="parsing_atr.onnx") != ""
    assert HumanParsingNode.fingerprint_inputs(parser=KEYPOINTS) == ""


def test_without_onnxruntime_it_says_what_to_install(
    photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "parsing_atr.onnx").write_bytes(b"\x08")
    try:
        with pytest.raises(TruePoseError, match=r"not installed.*onnxruntime-gpu"):
            run(HumanParsingNode, image=photo, parser="parsing_atr.onnx")
    finally:
        (FOLDER / "parsing_atr.onnx").unlink()


@pytest.mark.parametrize("parser", [f"schp-atr{DOWNLOAD}", MERGED])
@pytest.mark.parametrize("download", [False, True])
def test_missing_onnxruntime_is_said_before_anything_is_fetched(
    photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch, parser: str, download: bool
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(known, "download", lambda *_, **__: pytest.fail("something was fetched"))
    with pytest.raises(TruePoseError, match="onnxruntime, which is not installed") as caught:
        run(HumanParsingNode, image=photo, parser=parser, download=download)
    assert f"{sys.executable} -m pip install onnxruntime" in str(caught.value)


# --------------------------------------------------------------------------------------------------- keypoints


def test_keypoints_need_no_file() -> None:
    pytest.importorskip("cv2")
    image, true, pose, *_ = run(Mannequin, seed=3, pose="stand", width=192, height=256)
    parsing, mask, _, info = run(HumanParsingNode, image=image, parser=KEYPOINTS, pose=pose)
    assert parsing.size == (256, 192) and "without a model" in info
    person, found = 1 - true.mask("background") > 0.5, mask > 0.5
    assert (person & found).sum() / (person | found).sum() > 0.6


def test_without_opencv_keypoints_give_shapes_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    say_once.cache_clear()
    image, _, pose, *_ = run(Mannequin, seed=3, pose="stand", width=192, height=256)
    for _ in range(2):
        parsing, _, _, info = run(HumanParsingNode, image=image, pose=pose)
    expected = parse_from_keypoints(to_core(image, "the image"), read_bodies(pose, "the pose"), refine=False)
    assert torch.equal(parsing.masks, expected.masks)
    assert "shapes alone" in info
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{sys.executable} -m pip install opencv-python-headless" in said and "restart" in said


def test_keypoints_without_a_pose_or_of_another_picture_are_refused(photo: torch.Tensor) -> None:
    with pytest.raises(TruePoseError, match="needs the pose of the same image"):
        run(HumanParsingNode, image=photo)
    *_, pose = run(Mannequin, seed=3, pose="stand", width=256, height=192)[:3]
    with pytest.raises(TruePoseError, match="another picture"):
        run(HumanParsingNode, image=photo, pose=pose)
    *_, pose = run(Mannequin, seed=3, pose="stand", width=40, height=64)[:3]
    with pytest.raises(TruePoseError, match="2 frames and the image 3 pictures"):
        run(HumanParsingNode, image=torch.zeros(3, 64, 40, 3), pose=pose * 2)


# ------------------------------------------------------------------------------------------------------ editing


def test_edit_parsing_in_order(photo: torch.Tensor) -> None:
    _, parsing, *_ = run(Mannequin, seed=3, pose="stand", width=96, height=128)
    same, mask, preview = run(EditParsing, parsing=parsing, region="upper")
    assert same is parsing and preview.shape == (1, 128, 96, 3)
    torch.testing.assert_close(mask, parsing.mask("upper"))
    painted = torch.zeros(128, 96)
    painted[:10, :10] = 1
    edited, mask, _ = run(
        EditParsing, parsing=parsing, region="skin", mask=painted, mask_mode="replace", grow=2, blur=1.0
    )
    assert mask[0, 5, 5] > 0.99 and 0 < mask[0, 11, 5] < 1 and mask[0, 40:].max() < 1e-3
    torch.testing.assert_close(edited.masks.sum(1), torch.ones(1, 128, 96))
    with pytest.raises(TruePoseError, match="the mask is 40x60"):
        run(EditParsing, parsing=parsing, mask=photo[..., 0])

"""Every reader of files that people bring: small whole files to start from, what damages them, and what reads them."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import mutate
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from truepose_core.alignment.field import PoseField
from truepose_core.body.lift import LiftNet
from truepose_core.body.reading import read_body
from truepose_core.cli.batch.spec import Job, read_spec
from truepose_core.datasets.keypoints import read_annotations, read_pose_text
from truepose_core.datasets.pairs import read_pair_list, read_pairs
from truepose_core.importing.plan import describe
from truepose_core.models.cfld.encoder import CFLDConfig
from truepose_core.models.config import TruePoseConfig
from truepose_core.models.model import TruePoseModel
from truepose_core.models.store import load_model
from truepose_core.networks.onnx import OnnxSession
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.spec import recognise
from truepose_core.pictures.files import load_image
from truepose_core.pose import Pose, read_pose, write_pose
from truepose_core.pose.gallery import gallery_pose
from truepose_core.pose.skeleton import draw_pose
from truepose_core.training.small import SmallConfig, SmallTrainer, checkpoint_of
from truepose_core.weights.reading import CheckpointReader, refuse_quantised
from truepose_core.weights.small import load_small

Seed = tuple[str, Any]
"""A file's name, and what it is made of."""


@dataclass(frozen=True)
class Reader:
    """name: what `--reader` takes. seeds: whole files. damage: a seed's content -> bytes. read: reads a file, and
    returns or raises `TruePoseError`."""

    name: str
    seeds: Callable[[], list[Seed]]
    damage: Callable[[Any, random.Random], bytes]
    read: Callable[[Path], object]


# ------------------------------------------------------------------------------------------------------ pictures


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures() -> list[Seed]:
    """One small file of every format and mode."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (17, 16, 3), np.uint8))
    seen = Image.fromarray(rng.integers(0, 256, (16, 16, 4), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = noise.quantize(8)
    return [
        ("rgb.png", _encoded(noise, "PNG")),
        ("rgba.png", _encoded(seen, "PNG")),
        ("palette.png", _encoded(palette, "PNG", transparency=bytes([0, 128, 255]))),
        ("deep.png", _encoded(Image.fromarray(rng.integers(0, 2**16, (16, 16), np.uint16)), "PNG")),
        ("turned.jpg", _encoded(noise, "JPEG", exif=turned)),
        ("cmyk.jpg", _encoded(noise.convert("CMYK"), "JPEG")),
        ("progressive.jpg", _encoded(noise, "JPEG", progressive=True)),
        ("lossy.webp", _encoded(noise, "WEBP")),
        ("whole.webp", _encoded(seen, "WEBP", lossless=True)),
        ("rgb.bmp", _encoded(noise, "BMP")),
        ("packed.tif", _encoded(noise, "TIFF", compression="tiff_lzw")),
        ("floats.tif", _encoded(Image.fromarray(rng.random((16, 16), np.float32)), "TIFF")),
        ("palette.gif", _encoded(palette, "GIF")),
        ("rgb.ppm", _encoded(noise, "PPM")),
    ]


def label_maps() -> list[Seed]:
    """Label maps in grey, as a palette's indices, and in the regions' colours."""
    labels = np.random.default_rng(1).integers(0, 7, (17, 16)).astype(np.uint8)
    palette = Image.fromarray(labels, "P")
    palette.putpalette([9 * i for i in range(24)])
    preview = HumanParsing.from_labels(torch.from_numpy(labels)[None].long()).preview()
    colours = (preview[0].permute(1, 2, 0) * 255).round().byte().numpy()
    return [
        ("grey.png", _encoded(Image.fromarray(labels), "PNG")),
        ("palette.png", _encoded(palette, "PNG")),
        ("palette.gif", _encoded(palette, "GIF")),
        ("colours.png", _encoded(Image.fromarray(colours), "PNG")),
        ("deep.tif", _encoded(Image.fromarray(labels.astype(np.uint16)), "TIFF")),
    ]


def read_picture(path: Path) -> None:
    """Whole, and scaled down."""
    image = load_image(path)
    assert image.shape[:2] == (1, 3) and bool(image.isfinite().all()) and image.min() >= 0 and image.max() <= 1
    load_image(path, largest_side=16)


def read_labels(path: Path) -> None:
    """At its own size, and at another."""
    parsing = HumanParsing.from_label_image(path, "lip")
    assert HumanParsing.from_label_image(path, "lip", size=(8, 8)).batch == parsing.batch


# --------------------------------------------------------------------------------------------- keypoints, bodies


def poses() -> list[Seed]:
    """A frame, frames, and normalised keypoints."""
    one = write_pose(gallery_pose("walking", 64, 64))
    person = {"pose_keypoints_2d": [0.25, 0.5, 1] * 18, "face_keypoints_2d": None, "hand_left_keypoints_2d": []}
    return [("one.json", one[0]), ("two.json", [*one, {"people": []}]), ("short.json", {"people": [person, {}]})]


def read_keypoints(path: Path) -> None:
    """And draw them."""
    for pose in read_pose(path, canvas=(64, 64)):
        draw_pose(Pose(64, 64, pose.people), 64, 64)


def bodies() -> list[Seed]:
    """Our own bodies, a tool's in JSON, and arrays."""
    zeros = {"theta": [[[0.1, 0.0, 0.0]] * 24], "beta": [[0.0] * 10], "camera": [[0.9, 0.0, 0.1]]}
    turned = {"global_orient": [[3.1, 0.0, 0.0]], "body_pose": [[[0.0] * 3] * 23], "betas": [[0.0] * 10]}
    camera = {"pred_cam_t_full": [[0.0, 0.0, 20.0]], "focal_length": [500.0], "img_size": [64, 64]}
    buffer = BytesIO()
    np.savez(buffer, poses=np.zeros((1, 72), np.float32), betas=np.zeros((1, 10), np.float32))
    return [
        ("ours.json", {**zeros, "canvas": [64, 64]}),
        ("smpl.json", turned | camera),
        ("amass.npz", buffer.getvalue()),
    ]


def damage_body(content: Any, rng: random.Random) -> bytes:
    """JSON, or the bytes of arrays."""
    return mutate.bytes_of(content, rng) if isinstance(content, bytes) else _json(content, rng)


# ------------------------------------------------------------------------------------------------------- tables


def pairs() -> list[Seed]:
    """Tables as programs write them."""
    return [
        ("pairs.csv", "from,to\na.png,b.png\nb.png,a.png\n"),
        ("quoted.csv", 'to, from,why\r\n"a, 1.png","b.png",x\r\n\r\n"c""d.png",e.png,\r\n'),
    ]


def damage_table(text: str, rng: random.Random) -> bytes:
    """Cells, quotes and encodings."""
    if rng.randrange(3):
        cut = rng.randrange(len(text) + 1)
        new = rng.choice(('"', ",", "\n", "\r", "\x00", "a" * 300, "ä", ",,,", '"' * 3, "x" * 140_000))
        text = text[:cut] + new + text[cut + rng.randrange(3) :]
    return mutate.encoded(text, rng)


def pair_lists() -> list[Seed]:
    """Published lists of pairs."""
    listed = [{"source_image": "a.jpg", "target_image": f"{name}.jpg"} for name in "bcd"]
    return [("test_data.json", listed), ("train_pairs.txt", "img/b.jpg,img/a.jpg,img/c.jpg\n\nimg/d.jpg,img/a.jpg\n")]


def annotations() -> list[Seed]:
    """Keypoints beside published pictures: a table of them, and a file of one."""
    numbers = [10 * i for i in range(17)] + [-1]
    lines = "".join(f"{name}.jpg: {numbers}: {numbers[::-1]}\n" for name in "ab")
    return [
        ("annotation.csv", "name:keypoints_y:keypoints_x\n" + lines),
        ("pose.txt", "".join(f"{40.5 + 5 * i} {12 * i}\n" for i in range(17)) + "-1 -1\n"),
    ]


def read_annotated(path: Path) -> None:
    """Of either kind: every coordinate is a number."""
    people = [read_pose_text(path)] if path.suffix == ".txt" else read_annotations(path).values()
    assert all(np.isfinite(person.body).all() for person in people)


def batches() -> list[Seed]:
    """A table of a batch."""
    rows = "".join(f"row {i},photos/{i}.png,gallery:waving,{i},no,'face=1'\n" for i in range(3))
    return [("batch.csv", "id,source,pose,seed,estimate-pose,region\n" + rows)]


def read_batch(path: Path) -> None:
    """Every row is one that can be begun, or says why not."""
    for row in read_spec(path):
        assert row.problem or (row.source and row.pose and Job((row,)).argv is not None)


def damage_list(content: Any, rng: random.Random) -> bytes:
    """A list in JSON, or lines."""
    return damage_table(content, rng) if isinstance(content, str) else _json(content, rng)


SESSION = OnnxSession(
    Path("parser.onnx"), {"picture": (1, 3, 64, 64)}, {"scores": (1, 20, 64, 64)}, _types={}, _engine=None
)


def specs() -> list[Seed]:
    """A parser's description beside its network."""
    whole = {
        "labels": "lip",
        "input_size": [64, 64],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.2, 0.2, 0.2],
        "channels": "RGB",
        "layout": "NCHW",
        "resize": "keep",
        "output": "scores",
        "scores": "logits",
    }
    names = [f"label {i}" for i in range(20)]
    return [
        ("parser.json", whole),
        ("own.json", {**whole, "labels": dict.fromkeys(names, "upper") | {"label 0": "background"}, "output": 0}),
    ]


# ---------------------------------------------------------------------------------------------------- checkpoints


def checkpoints() -> list[Seed]:
    """The same weights in every form."""
    weights = {"net.weight": torch.ones(2, 3), "net.bias": torch.zeros(3, dtype=torch.float16)}

    def saved(content: object, **options: Any) -> bytes:
        buffer = BytesIO()
        torch.save(content, buffer, **options)
        return buffer.getvalue()

    return [
        ("new.pth", saved({"state_dict": weights, "epoch": 3})),
        ("old.bin", saved(weights, _use_new_zipfile_serialization=False)),
        ("whole.safetensors", written(weights, {"format": "pt"})),
        ("whole.ckpt", save(weights)),
        ("index.index.json", json.dumps({"weight_map": dict.fromkeys(weights, "whole.safetensors")}).encode()),
    ]


def damage_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """Bytes, and an index's names."""
    if data[:1] == b"{":
        return mutate.encoded(mutate.json_of(json.loads(data), rng), rng)
    return mutate.bytes_of(data, rng)


def read_checkpoint(path: Path) -> None:
    """Names, kind and every tensor."""
    with CheckpointReader(path) as reader:
        infos = reader.infos()
        describe(infos)
        refuse_quantised(infos, str(path))
        for name in infos:
            reader.tensor(name)


# --------------------------------------------------------------------------------------------------- our own files


@dataclass(frozen=True)
class Described:
    """A safetensors file of ours: its tensors, and metadata of which `key` is JSON."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    key: str


def damage_described(file: Described, rng: random.Random) -> bytes:
    """Mostly what the metadata says; else the header's bytes."""
    if rng.randrange(8) == 0:
        whole = written(file.tensors, file.metadata)
        header = 8 + struct.unpack("<Q", whole[:8])[0]
        return mutate.bytes_of(whole[:header], rng) + whole[header:]
    metadata = dict(file.metadata)
    metadata[file.key] = mutate.json_of(json.loads(metadata[file.key]), rng)
    if rng.randrange(12) == 0:
        del metadata[rng.choice(sorted(metadata))]
    return written(file.tensors, metadata)


def written(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; the library's own has its metadata in another order each time."""
    data = save(dict(tensors))
    length = struct.unpack("<Q", data[:8])[0]
    text = json.dumps({**json.loads(data[8 : 8 + length]), "__metadata__": dict(metadata)}).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def tiny_config() -> TruePoseConfig:
    """The smallest model: building it is most of a case's time."""
    unet = {
        "sample_size": 8,
        "in_channels": 12,
        "out_channels": 12,
        "block_out_channels": [8],
        "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"],
        "mid_block_type": None,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
    }
    schedule = {"num_train_timesteps": 10, "beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    return TruePoseConfig("tiny", unet, "pixels", 2, "none", pose_widths=(8,), scheduler=schedule, size=(16, 16))


def models() -> list[Seed]:
    """A tiny model file."""
    config = tiny_config()
    torch.manual_seed(0)
    tensors = {name: x.contiguous().clone() for name, x in TruePoseModel(config).state_dict().items()}
    return [
        ("model.safetensors", Described(tensors, {"architecture": "truepose", "config": config.to_json()}, "config"))
    ]


def small_networks() -> list[Seed]:
    """Files of small networks."""
    torch.manual_seed(0)
    found = []
    for kind, net in (("lift", LiftNet(8, 1, 1)), ("field", PoseField(8, 1))):
        metadata = {"architecture": f"truepose-{kind}", "config": json.dumps(net.sizes)}
        found.append((f"{kind}.safetensors", Described(net.state_dict(), metadata, "config")))
    return found


def read_small_network(path: Path) -> None:
    """As what its name says."""
    load_small(path, path.stem, {"lift": LiftNet, "field": PoseField}[path.stem])


class TinyTrainer(SmallTrainer):
    """A run whose network is one layer."""

    kind: ClassVar[str] = "tiny"

    def build(self) -> nn.Module:
        return nn.Linear(2, 2)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        return self.net(torch.ones(1, 2)).square().sum(), {}

    def describe(self) -> dict[str, Any]:
        return {}


def runs() -> list[Seed]:
    """A training checkpoint."""
    import tempfile

    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        trainer = TinyTrainer(SmallConfig(steps=4, batch=1), Path(folder), quiet=True)
        trainer._optimise()
        trainer.save()
        with safe_open(str(trainer.checkpoint), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
    return [(checkpoint_of(Path()).name, Described(tensors, metadata, "story"))]


def go_on(path: Path) -> None:
    """Go on from a checkpoint."""
    TinyTrainer(SmallConfig(steps=4, batch=1), path.parent, quiet=True)


def configurations() -> list[Seed]:
    """What models say of themselves, alone: far more cases than there is time to build."""
    cfld = CFLDConfig({"in_channels": 4, "layers_per_block": 2}, swin_depths=(1, 1, 2, 1))
    return [("truepose.json", json.loads(tiny_config().to_json())), ("cfld.json", json.loads(cfld.to_json()))]


def read_configuration(path: Path) -> None:
    """As its kind."""
    kind = CFLDConfig if path.stem == "cfld" else TruePoseConfig
    text = path.read_text(encoding="utf-8", errors="replace")
    again = kind.from_json(text)
    assert kind.from_json(again.to_json()) == again


def whole_of(content: Any) -> bytes:
    """The file of a seed, undamaged."""
    if isinstance(content, Described):
        return written(content.tensors, content.metadata)
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def _json(value: Any, rng: random.Random) -> bytes:
    return mutate.encoded(mutate.json_of(value, rng), rng)


READERS = (
    Reader("image", pictures, mutate.bytes_of, read_picture),
    Reader("label map", label_maps, mutate.bytes_of, read_labels),
    Reader("pose", poses, _json, read_keypoints),
    Reader("body", bodies, damage_body, read_body),
    Reader("csv", pairs, damage_table, read_pairs),
    Reader("pair list", pair_lists, damage_list, read_pair_list),
    Reader("annotations", annotations, damage_table, read_annotated),
    Reader("batch", batches, damage_table, read_batch),
    Reader("side JSON", specs, _json, lambda path: recognise(path.with_suffix(".onnx"), SESSION)),
    Reader("checkpoint", checkpoints, damage_checkpoint, read_checkpoint),
    Reader("configuration", configurations, _json, read_configuration),
    Reader("model", models, damage_described, load_model),
    Reader("small network", small_networks, damage_described, read_small_network),
    Reader("training checkpoint", runs, damage_described, go_on),
)

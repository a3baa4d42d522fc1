"""Tiny ONNX networks with the inputs and outputs of published parsers and random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def save_parser(
    path: Path,
    heads: dict[str, int],
    size: tuple[int | None, int | None] = (512, 512),
    *,
    batch: int | None = 1,
    layout: str = "NCHW",
    softmax: bool = False,
    seed: int = 0,
    opset: int = 17,
    ir_version: int = 8,
    strength: float = 3.0,
) -> Path:
    """heads: output name -> channels. Every head is a 7x7 convolution to a quarter of the size."""
    rng = np.random.default_rng(seed)
    nodes, weights = [], []
    shape = [batch or "batch", 3, size[0] or "height", size[1] or "width"]
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", ["picture"], ["x"], perm=[0, 3, 1, 2]))
        shape = [shape[0], *shape[2:], 3]
    first = "picture" if layout == "NCHW" else "x"
    outputs = []
    for name, channels in heads.items():
        kernel = (strength * rng.standard_normal((channels, 3, 7, 7)) / 7).astype(np.float32)
        weights.append(numpy_helper.from_array(kernel, f"{name}.weight"))
        raw = f"{name}.raw"
        nodes.append(
            helper.make_node(
                "Conv", [first, f"{name}.weight"], [raw], kernel_shape=[7, 7], strides=[4, 4], pads=[3] * 4
            )
        )
        if softmax:
            nodes.append(helper.make_node("Softmax", [raw], [f"{raw}.p"], axis=1))
            raw = f"{raw}.p"
        if layout == "NHWC":
            nodes.append(helper.make_node("Transpose", [raw], [name], perm=[0, 2, 3, 1]))
        else:
            nodes.append(helper.make_node("Identity", [raw], [name]))
        sides = [None if side is None else (side - 1) // 4 + 1 for side in size]
        sides = [side or word for side, word in zip(sides, ("h4", "w4"), strict=True)]
        full = [batch or "batch", channels, *sides] if layout == "NCHW" else [batch or "batch", *sides, channels]
        outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, full))
    graph = helper.make_graph(
        nodes, "parser", [helper.make_tensor_value_info("picture", TensorProto.FLOAT, shape)], outputs, weights
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    path.write_bytes(model.SerializeToString())
    return path


SCHP_HEADS = {"atr": {"coarse": 18, "fused": 18, "edge": 2}, "lip": {"coarse": 20, "fused": 20, "edge": 2}}


def save_schp(folder: Path, kind: str, **options: object) -> Path:
    """parsing_atr.onnx or parsing_lip.onnx, with SCHP's three outputs."""
    size = (512, 512) if kind == "atr" else (473, 473)
    return save_parser(folder / f"parsing_{kind}.onnx", SCHP_HEADS[kind], size, **options)


def save_segformer(folder: Path, **options: object) -> Path:
    """segformer_b2_clothes.onnx, every side free, as optimum exports it."""
    return save_parser(folder / "segformer_b2_clothes.onnx", {"logits": 18}, (None, None), batch=None, **options)


def save_add_one(path: Path, shape: tuple[int | str, ...] = ("n",), opset: int = 17, ir_version: int = 8) -> Path:
    """A network that adds one; it is no parser."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name in ("x", "y")]
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    graph = helper.make_graph([helper.make_node("Add", ["x", "one"], ["y"])], "g", ends[:1], ends[1:], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    path.write_bytes(model.SerializeToString())
    return path

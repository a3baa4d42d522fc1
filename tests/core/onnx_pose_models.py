"""Tiny ONNX networks with the inputs and outputs of YOLOX and DWPose and random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

DETECTOR_CELLS = 8400


def _save(path: Path, nodes: list, weights: dict, inputs: dict, outputs: dict) -> Path:
    def values(sides: dict) -> list:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in sides.items()]

    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "tiny", values(inputs), values(outputs), tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def save_detector(path: Path, *, classes: int = 80, seed: int = 0) -> Path:
    """YOLOX's raw output [1, 8400, 5 + classes] of a [1, 3, 640, 640] picture: one convolution per stride."""
    rng = np.random.default_rng(seed)
    nodes, weights, rows = [], {}, []
    weights["size"] = np.array([1, 5 + classes, -1], dtype=np.int64)
    for stride in (8, 16, 32):
        kernel = rng.standard_normal((5 + classes, 3, stride, stride)).astype(np.float32)
        kernel *= 0.05 / stride / 3
        bias = rng.standard_normal(5 + classes).astype(np.float32) * 0.3
        bias[2:4] = np.log(120 / stride)
        bias[4] = -2
        weights |= {f"k{stride}": kernel, f"b{stride}": bias}
        inputs = ["images", f"k{stride}", f"b{stride}"]
        nodes.append(helper.make_node("Conv", inputs, [f"c{stride}"], kernel_shape=[stride] * 2, strides=[stride] * 2))
        nodes.append(helper.make_node("Reshape", [f"c{stride}", "size"], [f"r{stride}"]))
        rows.append(f"r{stride}")
    weights["split"] = np.array([4, 1 + classes], dtype=np.int64)
    nodes += [
        helper.make_node("Concat", rows, ["all"], axis=2),
        helper.make_node("Transpose", ["all"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("Split", ["turned", "split"], ["box", "logit"], axis=2),
        helper.make_node("Sigmoid", ["logit"], ["score"]),
        helper.make_node("Concat", ["box", "score"], ["output"], axis=2),
    ]
    shape = [1, DETECTOR_CELLS, 5 + classes]
    return _save(path, nodes, weights, {"images": [1, 3, 640, 640]}, {"output": shape})


def save_boxes(path: Path, boxes: np.ndarray) -> Path:
    """A detector with non-maximum suppression inside: always these boxes [N, 5]."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0),
        helper.make_node("Sub", ["mean", "mean"], ["nothing"]),
        helper.make_node("Add", ["boxes", "nothing"], ["dets"]),
    ]
    weights = {"boxes": boxes[None].astype(np.float32)}
    return _save(path, nodes, weights, {"images": [1, 3, 640, 640]}, {"dets": [1, len(boxes), 5]})


def save_pose(path: Path, *, points: int = 133, height: int = 384, width: int = 288, seed: int = 0) -> Path:
    """DWPose's simcc_x [1, 133, 2 width] and simcc_y [1, 133, 2 height]: a convolution along each axis."""
    rng = np.random.default_rng(seed)
    nodes, weights = [], {}
    for name, axis in (("x", 2), ("y", 3)):
        kernel = rng.standard_normal((3, points, 8)).astype(np.float32) * 0.8
        bias = rng.standard_normal(points).astype(np.float32) - 2
        weights |= {f"k{name}": kernel, f"b{name}": bias}
        nodes += [
            helper.make_node("ReduceMean", ["input"], [f"m{name}"], axes=[axis], keepdims=0),
            helper.make_node(
                "ConvTranspose",
                [f"m{name}", f"k{name}", f"b{name}"],
                [f"r{name}"],
                kernel_shape=[8],
                strides=[2],
                pads=[3, 3],
            ),
            helper.make_node("Sigmoid", [f"r{name}"], [f"simcc_{name}"]),
        ]
    outputs = {"simcc_x": ["n", points, 2 * width], "simcc_y": ["n", points, 2 * height]}
    return _save(path, nodes, weights, {"input": ["n", 3, height, width]}, outputs)

"""Small files in place of what a user has: networks that read a photo's pose, an IP-Adapter.

The pose networks look at nothing. They have the inputs and outputs of YOLOX and DWPose, and answer with the box and the
keypoints of the one photo they are made for: everything around the networks is put to the test, nothing in them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from truepose_core.networks.known import KNOWN

DETECTOR_SIDE = 640
POSE_WIDTH, POSE_HEIGHT = 288, 384
WHOLEBODY = 133
PADDING = 1.25
"""How much larger than the person's box the crop is that DWPose gets."""
COCO = (0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10)
"""Where each of COCO's 17 keypoints is among OpenPose's 18."""


def save_networks(folder: Path, size: tuple[int, int], body: np.ndarray) -> None:
    """YOLOX and DWPose for a picture of size (height, width) with somebody whose keypoints are body [18, 3]."""
    folder.mkdir(parents=True, exist_ok=True)
    seen = body[body[:, 2] > 0, :2]
    low, high = seen.min(0), seen.max(0)
    around = 0.1 * (high - low).max()
    box = np.concatenate([(low - around).clip(0), np.minimum(high + around, (size[1], size[0]))])
    scale = min(DETECTOR_SIDE / size[0], DETECTOR_SIDE / size[1])
    boxes = np.array([[[*box * scale, 0.9]]])
    _save(folder / KNOWN["yolox-l"].file, [1, 3, DETECTOR_SIDE, DETECTOR_SIDE], {"dets": boxes})

    centre, extent = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * PADDING
    extent = np.maximum(extent, extent[::-1] * (POSE_WIDTH / POSE_HEIGHT, POSE_HEIGHT / POSE_WIDTH))
    outputs = {}
    for axis, (name, side) in enumerate((("simcc_x", POSE_WIDTH), ("simcc_y", POSE_HEIGHT))):
        response = np.zeros((1, WHOLEBODY, 2 * side))
        for number, point in enumerate(body[list(COCO)]):
            at = (point[axis] - centre[axis] + extent[axis] / 2) / extent[axis] * 2 * side
            response[0, number, int(np.clip(round(at), 0, 2 * side - 1))] = 0.9 * (point[2] > 0)
        outputs[name] = response
    _save(folder / KNOWN["dwpose"].file, [1, 3, POSE_HEIGHT, POSE_WIDTH], outputs)


def _save(path: Path, shape: list[int], outputs: dict[str, np.ndarray]) -> None:
    """A network that takes one picture and always gives these outputs."""
    from onnx import TensorProto, helper, numpy_helper

    # An output that depends on no input is refused: the constants are added to the input's mean minus itself.
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], keepdims=0),
        helper.make_node("Sub", ["mean", "mean"], ["nothing"]),
        *(helper.make_node("Add", [f"{name}_always", "nothing"], [name]) for name in outputs),
    ]
    always = [numpy_helper.from_array(x.astype(np.float32), f"{name}_always") for name, x in outputs.items()]
    takes = [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)]
    gives = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in outputs.items()]
    graph = helper.make_graph(nodes, "known", takes, gives, always)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def save_ip_adapter(path: Path, widths: tuple[int, ...], context: int, embedding: int) -> None:
    """A plain IP-Adapter with random weights. widths: of the cross-attentions, in the file's order."""
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(0)
    weights = {
        "image_proj.proj.weight": torch.randn((4 * context, embedding), generator=random) / embedding**0.5,
        "image_proj.proj.bias": torch.zeros(4 * context),
        "image_proj.norm.weight": torch.ones(context),
        "image_proj.norm.bias": torch.zeros(context),
    }
    for number, width in enumerate(widths):
        for part in "kv":
            name = f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"
            weights[name] = torch.randn((width, context), generator=random) / context**0.5
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, path)

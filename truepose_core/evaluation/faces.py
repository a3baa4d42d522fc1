"""Face similarity: is it the same face? The cosine between two embeddings of a face network that the user has.

Faces are aligned as ArcFace's networks expect (Deng et al., ArcFace, 2019): the similarity transform that brings the
eyes and the nose nearest to their places in a picture of 112x112. The keypoints are the true picture's, for the result
too: it was asked to show the face there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.datasets.keypoints import visible
from truepose_core.errors import TruePoseError
from truepose_core.pose import Person
from truepose_core.pose.keypoints import BODY_KEYPOINTS

if TYPE_CHECKING:
    from truepose_core.networks.onnx import OnnxSession

SIDE = 112
PLACES = {"r_eye": (38.2946, 51.6963), "l_eye": (73.5318, 51.5014), "nose": (56.0252, 71.7366)}
"""Where ArcFace's template has them, in pixels of 112x112; the person's right eye is on the picture's left."""
_JOINTS = [BODY_KEYPOINTS.index(name) for name in PLACES]


@dataclass(frozen=True)
class FaceNetwork:
    """An ONNX network [1, 3, S, S] -> [1, D], RGB of -1 to 1 (ArcFace's)."""

    session: OnnxSession
    side: int

    def similarity(self, result: Tensor, truth: Tensor, person: Person) -> float:
        """Cosine of the two faces, -1 to 1; NaN where an eye or the nose is missing from the keypoints.

        result, truth: [3, H, W] in [0, 1], sizes may differ. person: the true picture's keypoints.
        """
        if not visible(person, _JOINTS):
            return float("nan")
        one, other = (self.embedding(aligned_face(x, person, self.side)) for x in (result, truth))
        return float(F.cosine_similarity(one, other, dim=0))

    def embedding(self, face: Tensor) -> Tensor:
        """[3, S, S] in [0, 1] -> [D]."""
        name = next(iter(self.session.inputs))
        output = self.session.run({name: (face[None] * 2 - 1).numpy()})
        return torch.from_numpy(next(iter(output.values()))).flatten().double()


def open_face_network(path: str | Path, provider: str = "auto") -> FaceNetwork:
    """Raises TruePoseError for a file that is no network of this shape."""
    from truepose_core.networks.onnx import open_session, shape_text

    session = open_session(path, provider=provider)
    shapes = list(session.inputs.values())
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3 or len(session.outputs) != 1:
        told = ", ".join(shape_text(shape) for shape in shapes)
        raise TruePoseError(
            f"{path} takes {told} and gives {len(session.outputs)} outputs; expected a face network that takes one "
            "[1, 3, 112, 112] and gives one embedding (ArcFace)"
        )
    return FaceNetwork(session, shapes[0][2] or SIDE)


def aligned_face(picture: Tensor, person: Person, side: int = SIDE) -> Tensor:
    """The face [3, side, side], where its eyes and nose are nearest to `PLACES`; black outside of the picture.

    picture: [3, H, W] in [0, 1]. person: with both eyes and the nose.
    """
    height, width = picture.shape[-2:]
    xy = torch.tensor(person.body[_JOINTS, :2], dtype=torch.float64) * torch.tensor([width, height])
    places = torch.tensor(list(PLACES.values()), dtype=torch.float64) * (side / SIDE)
    a, b, x, y = similarity_transform(places, xy)
    # Pixel centres of the face -> pixels of the picture -> grid_sample's [-1, 1].
    at = torch.arange(side, dtype=torch.float64) + 0.5
    v, u = torch.meshgrid(at, at, indexing="ij")
    grid = torch.stack([(a * u - b * v + x) * 2 / width - 1, (b * u + a * v + y) * 2 / height - 1], -1)
    return F.grid_sample(picture[None], grid[None].float(), align_corners=False)[0]


def similarity_transform(source: Tensor, target: Tensor) -> tuple[float, float, float, float]:
    """(a, b, x, y) of the least squares fit  target = [[a, -b], [b, a]] source + (x, y), for points [N, 2]."""
    rows = []
    for u, v in source.tolist():
        rows += [[u, -v, 1, 0], [v, u, 0, 1]]
    solution = torch.linalg.lstsq(torch.tensor(rows, dtype=torch.float64), target.reshape(-1, 1)).solution
    a, b, x, y = solution.flatten().tolist()
    return a, b, x, y

"""Human parsing of photographs with ONNX networks: SCHP, SegFormer, and any other that a JSON file describes.

The network sees the picture at its own input size; its scores are then brought to the picture's size, channel by
channel, before the softmax, so that edges are smooth. Both steps are linear and separable: one small matrix per axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.networks.known import Progress, default_folder, find, get, locate
from truepose_core.networks.onnx import OnnxSession, check_runtime, open_session
from truepose_core.parsing.human_parsing import HumanParsing
from truepose_core.parsing.spec import BUILT_IN, ParserSpec, input_name, output_name, recognise
from truepose_core.pictures.files import MAX_PIXELS, MAX_SIDE
from truepose_core.regions import N_REGIONS, Region

ATR_LIP = "atr+lip"
"""The name of SCHP's two parsers merged."""
ATR_LIP_PARTS = ("schp-atr", "schp-lip")

# Pictures per run where the network takes any number, and scores held at once while they are brought to size.
_PICTURES = 4
_SCORES = 1 << 22


@dataclass(frozen=True, eq=False)
class PhotoParser:
    """A network and what it wants. Sessions are shared, see `onnx_runtime`."""

    spec: ParserSpec
    session: OnnxSession

    @property
    def description(self) -> str:
        """For people: file, settings and the provider in use."""
        return f"{self.session.path.name} (as {Path(self.spec.name).name}) on {self.session.provider}"


@dataclass(frozen=True, eq=False)
class MergedParser:
    """SCHP's ATR and LIP parsers, merged by `merge_atr_lip`. Raises `TruePoseError` for other label sets."""

    atr: PhotoParser
    lip: PhotoParser

    def __post_init__(self) -> None:
        for parser, name in zip((self.atr, self.lip), ATR_LIP_PARTS, strict=True):
            if parser.spec.labels != BUILT_IN[name].labels:
                raise TruePoseError(
                    f"{parser.session.path.name} has other labels than {name}, by its JSON file; merging needs "
                    "SCHP's own label sets"
                )

    @property
    def description(self) -> str:
        return f"{self.atr.description} merged with {self.lip.description}"


def open_parser(path: Path | str, *, provider: str = "auto") -> PhotoParser:
    """Open an ONNX parser. Raises `TruePoseError` as `open_session` and `recognise`."""
    session = open_session(path, provider=provider)
    return PhotoParser(recognise(Path(path), session), session)


def choose_parser(
    name: str,
    folders: Iterable[Path | str] = (),
    *,
    provider: str = "auto",
    download: bool = False,
    progress: Progress | None = None,
) -> PhotoParser | MergedParser:
    """The parser a user names: "atr+lip", a known model ("schp-atr"), a file in one of the folders, or a path.

    folders: where models are, `default_folder()` if there are none. download: fetch a known model that is missing into
    the first folder. Raises `TruePoseError` without onnxruntime, and one that says which file to put where, or lists
    what there is.
    """
    check_runtime(provider)
    folders = [Path(folder) for folder in folders] or [default_folder()]
    if name == ATR_LIP:
        parts = (
            choose_parser(n, folders, provider=provider, download=download, progress=progress) for n in ATR_LIP_PARTS
        )
        return MergedParser(*parts)
    if name in BUILT_IN:
        if download and find(name, folders) is None:
            get(name, folders[0], progress=progress)
        return open_parser(locate(name, folders), provider=provider)
    for path in (*(folder / name for folder in folders), Path(name)):
        if path.suffix.lower() == ".onnx" and path.is_file():
            return open_parser(path, provider=provider)
    raise TruePoseError(
        f"there is no parser {name!r} in {' or '.join(map(str, folders))}; expected {ATR_LIP}, {', '.join(BUILT_IN)}, "
        "or an .onnx file"
    )


def parse_image(image: Tensor, parser: PhotoParser | MergedParser) -> HumanParsing:
    """The regions of every picture: softmax probabilities of the labels, summed per region.

    image: [B, 3, H, W] in [0, 1]. Returns a parsing of the same size and batch, on the image's device. Raises
    `TruePoseError` for a picture of more than `MAX_PIXELS`, and when the network's output is not what its spec says.
    """
    if isinstance(parser, MergedParser):
        atr = label_masks(image, parser.atr, _ATR_GROUPS, N_REGIONS + 1)
        return merge_atr_lip(atr, label_masks(image, parser.lip, _LIP_GROUPS, 4))
    return HumanParsing(label_masks(image, parser, [int(region) for _, region in parser.spec.labels], N_REGIONS))


# ---------------------------------------------------------------------------------------------------- ATR and LIP

_ARMS = ("Left-arm", "Right-arm")

# ATR's labels as their regions, except that the arms are a group of their own.
_ATR_GROUPS = [N_REGIONS if label in _ARMS else int(region) for label, region in BUILT_IN["schp-atr"].labels]
# LIP's labels as rest 0, face 1, what else is on a head 2, arms 3.
_LIP_GROUPS = [
    3 if label in _ARMS else {Region.FACE: 1, Region.HAIR: 2}.get(region, 2 if label in ("Hat", "Sunglasses") else 0)
    for label, region in BUILT_IN["schp-lip"].labels
]


def merge_atr_lip(atr: Tensor, lip: Tensor) -> HumanParsing:
    """ATR's parsing with LIP's knowledge of neck and arms.

    atr: [B, 8, H, W], the seven regions with the arms apart from the skin as an eighth; lip: [B, 4, H, W], rest, face,
    hair with hat and glasses, arms; both sum to 1. The rule is ours, after what try-on systems do with hard labels:

    * neck: what ATR calls face and LIP calls neither face nor anything else on a head moves from face to skin;
    * arms: a pixel is an arm as much as the parser says that sees more of one; the other regions keep their shares of
      the rest. Arms are skin.
    """
    regions, arms = atr[:, :N_REGIONS].clone(), atr[:, N_REGIONS]
    neck = regions[:, Region.FACE] * (1 - lip[:, 1] - lip[:, 2]).clamp(0, 1)
    regions[:, Region.FACE] -= neck
    regions[:, Region.SKIN] += neck
    more = torch.maximum(arms, lip[:, 3]).clamp(max=1)
    regions *= ((1 - more) / (1 - arms).clamp(min=1e-6))[:, None]
    regions[:, Region.SKIN] += more
    regions /= regions.sum(1, keepdim=True)
    return HumanParsing(regions)


# ------------------------------------------------------------------------------------------------- the network


def label_masks(image: Tensor, parser: PhotoParser, groups: Sequence[int], count: int) -> Tensor:
    """Softmax probabilities summed over `count` groups of labels: [B, count, H, W].

    image: [B, 3, H, W] in [0, 1]; groups: the group of each label, 0 to count - 1. Memory beyond the result is bounded:
    the scores are brought to the picture's size a few rows at a time.
    """
    size = _checked_size(image)
    spec = parser.spec
    sums = F.one_hot(torch.tensor(groups, device=image.device), count).T.float()
    masks = image.new_empty(image.shape[0], count, *size, dtype=torch.float32)
    for start in range(0, len(image), _PICTURES):
        scores = run_network(image[start : start + _PICTURES], parser)
        rows, columns = (matrix.to(image.device) for matrix in to_picture(spec, size, scores.shape[2:]))
        step = max(1, _SCORES // (scores.shape[1] * size[1]))
        for number, one in enumerate(scores.to(image.device), start):
            for top in range(0, size[0], step):
                large = rows[top : top + step] @ one @ columns.T
                masks[number, :, top : top + step] = (sums @ large.flatten(1).softmax(0)).unflatten(1, large.shape[1:])
    return masks


def run_network(image: Tensor, parser: PhotoParser) -> Tensor:
    """The network's scores: image [B, 3, H, W] in [0, 1] -> logits [B, labels, h, w] on the CPU, at its own size.

    Raises `TruePoseError` when the output has another shape than the spec says or is not finite.
    """
    spec, session = parser.spec, parser.session
    name, output = input_name(session, spec), output_name(session, spec)
    given = prepare(image, spec).cpu()
    # A network made for a fixed number of pictures gets that many, the last one repeated.
    fixed = session.inputs[name][0] or len(given)
    outputs = []
    for start in range(0, len(given), fixed):
        part = given[start : start + fixed]
        filled = torch.cat([part, part[-1:].expand(fixed - len(part), -1, -1, -1)])
        outputs.append(torch.from_numpy(session.run({name: filled.numpy()})[output])[: len(part)])
    scores = torch.cat(outputs).float()
    if scores.dim() == 4 and spec.layout == "NHWC":
        scores = scores.movedim(-1, 1)
    if scores.dim() != 4 or scores.shape[1] != len(spec.labels):
        raise TruePoseError(
            f"output {output!r} of {session.path.name} is {tuple(scores.shape)}; parser {Path(spec.name).name} has "
            f"scores for {len(spec.labels)} labels. Name another output in its JSON file"
        )
    if not bool(scores.isfinite().all()):
        raise TruePoseError(
            f"{session.path.name} gives NaN or infinite scores on {session.provider}; the file may be damaged, or made "
            "in 16 bits: use the 32-bit one"
        )
    return scores.clamp(min=1e-6).log() if spec.scores == "probabilities" else scores


def _checked_size(image: Tensor) -> tuple[int, int]:
    if image.dim() != 4 or image.shape[1] != 3 or not image.is_floating_point() or 0 in image.shape:
        raise TruePoseError(f"the image is {image.dtype} {tuple(image.shape)}; expected float [B, 3, H, W] in 0..1")
    height, width = image.shape[2:]
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise TruePoseError(
            f"the image is {width}x{height} pixels; a parsing may have {MAX_SIDE} on a side and {MAX_PIXELS} in all. "
            "Make it smaller first"
        )
    return height, width


# ------------------------------------------------------------------------------------------------- geometry


def prepare(image: Tensor, spec: ParserSpec) -> Tensor:
    """What the network sees: [B, 3, H, W] in [0, 1] -> float32 [B, 3, h, w] (or [B, h, w, 3]), normalised.

    "keep" samples bilinearly without smoothing, as SCHP does. A picture more than twice too large is first averaged in
    whole blocks (ours): sampling would skip pixels. "stretch" is the smoothed bilinear of Pillow and transformers.
    """
    image = image.float()
    if spec.resize == "stretch":
        image = F.interpolate(image, spec.input_size, mode="bilinear", antialias=True, align_corners=False)
    else:
        height, width = image.shape[2:]
        block = max(1, int(1 / keep_scale(spec.input_size, (height, width))))
        if block > 1:
            edges = (0, -width % block, 0, -height % block)
            image = F.avg_pool2d(F.pad(image, edges, mode="replicate"), block)
        rows, columns = (
            _from_picture(spec.input_size, (height, width), axis, block, image.shape[2 + axis]).to(image.device)
            for axis in (0, 1)
        )
        image = rows @ image @ columns.T
    if spec.channels == "BGR":
        image = image.flip(1)
    image = (image - image.new_tensor(spec.mean)[:, None, None]) / image.new_tensor(spec.std)[:, None, None]
    return image if spec.layout == "NCHW" else image.movedim(1, -1)


def to_picture(spec: ParserSpec, size: tuple[int, int], cells: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The matrices ([H, h], [W, w]) that bring scores [h, w] to the picture's size: rows @ scores @ columns.T."""
    if spec.resize == "stretch":
        return tuple(_linear(cells[axis], size[axis], align_corners=False) for axis in (0, 1))
    scale = keep_scale(spec.input_size, size)
    matrices = []
    for axis in (0, 1):
        side, inside = size[axis], spec.input_size[axis]
        at = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * scale + (inside - 1) / 2
        # Two steps as in the original: to the input's size corner to corner, then sampled where the pixels went.
        matrices.append((_hat(at, inside) @ _linear(cells[axis], inside, align_corners=True).double()).float())
    return tuple(matrices)


def keep_scale(input_size: tuple[int, int], size: tuple[int, int]) -> float:
    """The scale from picture to input, one for both axes, that puts the corner pixels of the side that fills the input
    on corner pixels (SCHP's, whose inputs are square)."""
    return min((inside - 1) / max(side - 1, 1) for inside, side in zip(input_size, size, strict=True))


def _from_picture(input_size: tuple[int, int], size: tuple[int, int], axis: int, block: int, cells: int) -> Tensor:
    """[input side, cells]: bilinear samples of the block averages; black outside of the picture."""
    side, inside = size[axis], input_size[axis]
    at = (torch.arange(inside, dtype=torch.float64) - (inside - 1) / 2) / keep_scale(input_size, size) + (side - 1) / 2
    beyond = torch.maximum(-at, at - (side - 1)).clamp(min=0)
    cell = ((at + 0.5) / block - 0.5).clamp(0, cells - 1)
    return (_hat(cell, cells) * (1 - beyond).clamp(min=0)[:, None]).float()


def _hat(at: Tensor, cells: int) -> Tensor:
    """Weights of linear interpolation at positions `at` [N] among `cells` samples, 0 outside: [N, cells]."""
    return (1 - (at[:, None] - torch.arange(cells, dtype=at.dtype)).abs()).clamp(min=0)


def _linear(cells: int, side: int, align_corners: bool) -> Tensor:
    """[side, cells]: torch's linear interpolation as a matrix."""
    return F.interpolate(torch.eye(cells)[None], side, mode="linear", align_corners=align_corners)[0].T

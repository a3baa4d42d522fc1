"""Sample sheets: what a model makes of the first people of the test split (or of given pairs), while it trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from truepose_core.models.model import TruePoseModel
    from truepose_core.training.data import TrainingBatch


def sample_sheet(
    model: TruePoseModel, pairs: int, seed: int, steps: int = 8, scale: int = 3, batch: TrainingBatch | None = None
) -> Tensor:
    """A sheet with one row per pair: source | skeleton | result | truth.

    pairs: how many rows; they are the first pairs of the mannequin world's test split. batch: the pairs to show instead
    of those, one target for each source. seed: of the sampling noise.
    steps: sampling steps. scale: pixels are enlarged by this whole number.
    Returns [1, 3, H, W] float in [0, 1] on the CPU.
    The model samples in evaluation mode and is left in the mode it was in; no global random state is used.
    Raises TruePoseError for fewer than 1 pair or a scale below 1.
    """
    from truepose_core.mannequin.split import split_pairs
    from truepose_core.parsing import HumanParsing
    from truepose_core.pictures.sheet import tile
    from truepose_core.pipeline import TruePosePipeline
    from truepose_core.pose.skeleton import draw_skeleton
    from truepose_core.training.data import TrainingBatch

    if pairs < 1 or scale < 1:
        raise TruePoseError(f"a sample sheet of {pairs} pairs at scale {scale}; expected at least 1 of both")
    if batch is None:
        people = split_pairs(pairs, model.config.size)
        source, target = people.source, people.target
        batch = TrainingBatch(
            source.image,
            HumanParsing(source.parsing),
            source.keypoints,
            target.image,
            HumanParsing(target.parsing),
            target.keypoints,
        )
    pipe = TruePosePipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        result = pipe(
            batch.source_image,
            batch.target_body,
            batch.source_parsing,
            batch.source_body,
            num_inference_steps=steps,
            seed=seed,
        ).images
    finally:
        # Module by module: frozen parts may have been in evaluation mode before.
        for module, training in modes.items():
            module.training = training
    skeleton = draw_skeleton(batch.target_body, *model.config.size)
    columns = (batch.source_image, skeleton, result, batch.target_image)
    return tile([list(row) for row in zip(*columns, strict=True)], scale)

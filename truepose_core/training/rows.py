"""What `truepose train --row NAME` trains: the models (`train.ROWS`), and the small networks beside them (here)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from truepose_core.training.small import SmallConfig, SmallTrainer


@dataclass(frozen=True)
class SmallRow:
    """Where a row's settings (a `SmallConfig`) and its trainer are, and what it is, in one line."""

    module: str
    settings: str
    trainer: str
    about: str

    def load(self) -> tuple[type[SmallConfig], type[SmallTrainer]]:
        """(the settings, the trainer)."""
        module = import_module(f"truepose_core.training.{self.module}")
        return getattr(module, self.settings), getattr(module, self.trainer)


SMALL_ROWS = {
    "lift": SmallRow("lift", "LiftConfig", "LiftTrainer", "keypoints to a body"),
    "alignment": SmallRow(
        "alignment", "AlignTrainingConfig", "AlignTrainer", "recurrent alignment of a carried picture"
    ),
    "field": SmallRow("field", "FieldConfig", "FieldTrainer", "how far a pose is from the valid ones"),
    "keypoints": SmallRow(
        "keypoints", "KeypointConfig", "KeypointTrainer", "reads the pose off a picture in the making, for guidance"
    ),
}

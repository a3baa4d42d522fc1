"""The sampling loops."""

from truepose_core.pipeline.truepose import TransferOutput, TruePosePipeline

__all__ = ["TransferOutput", "TruePosePipeline"]

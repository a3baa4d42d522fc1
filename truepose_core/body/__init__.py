"""A body under the picture: lifted from keypoints or given, rendered, and a surface to carry pictures along."""

from .pose import BodyPose

__all__ = ["BodyPose"]

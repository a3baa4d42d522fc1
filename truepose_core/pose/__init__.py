"""Poses: keypoints, their files, and everything done to them."""

from truepose_core.pose.keypoints import Person, Pose, body_tensor
from truepose_core.pose.openpose import read_pose, write_pose

__all__ = ["Person", "Pose", "body_tensor", "read_pose", "write_pose"]

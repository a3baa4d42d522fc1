"""A procedural textured 3D mannequin: pictures of people with exact ground truth, no download."""

from .body import (
    JOINTS,
    BodyPoses,
    axis_angle_to_matrix,
    forward_kinematics,
    matrix_to_axis_angle,
    mirror_poses,
    rest_joints,
)
from .identity import BOTTOM_PATTERNS, HAIR_LENGTHS, LOGO_SHAPES, TOP_PATTERNS, Identities, sample_identities
from .poses import POSE_KINDS, VIEWS, ready_poses, sample_poses
from .render import Rendering, render
from .twins import mirror_arm, mirror_body
from .world import SPLITS, PairBatch, render_people, render_twins, sample_pairs

__all__ = [
    "BOTTOM_PATTERNS",
    "HAIR_LENGTHS",
    "JOINTS",
    "LOGO_SHAPES",
    "POSE_KINDS",
    "SPLITS",
    "TOP_PATTERNS",
    "VIEWS",
    "BodyPoses",
    "Identities",
    "PairBatch",
    "Rendering",
    "axis_angle_to_matrix",
    "forward_kinematics",
    "matrix_to_axis_angle",
    "mirror_arm",
    "mirror_body",
    "mirror_poses",
    "ready_poses",
    "render",
    "render_people",
    "render_twins",
    "rest_joints",
    "sample_identities",
    "sample_pairs",
    "sample_poses",
]

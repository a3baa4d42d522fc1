"""The photos that workflows start on: mannequins, because everybody may copy them.

python workflows/source/photos.py     writes workflows/input/*.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

FOLDER = ROOT / "workflows" / "input"
PEOPLE = {"person.jpg": 5, "other.jpg": 6}
"""File -> who is in it. All stand alike: a pose network that knows one photo knows the others."""
HEIGHT, WIDTH = 704, 528
BESIDE, ABOVE = 120, 112
"""Pixels of background around what is rendered, for poses that reach further."""


def person_photo(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 [H, W, 3] with somebody whole in its middle, and the keypoints [18, 3] (x, y in pixels, seen)."""
    from truepose_core.mannequin import ready_poses, render, sample_identities

    shown = render(sample_identities([seed], 1), ready_poses()["akimbo"], HEIGHT, WIDTH)
    pixels = (shown.image[0].movedim(0, -1).numpy() * 255).round().astype(np.uint8)
    body = shown.keypoints[0].numpy() * (WIDTH, HEIGHT, 1) + (BESIDE, ABOVE, 0)
    padded = np.pad(pixels, ((ABOVE, ABOVE), (BESIDE, BESIDE), (0, 0)), mode="edge")
    return padded, body * (body[:, 2:] > 0)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, seed in PEOPLE.items():
        Image.fromarray(person_photo(seed)[0]).save(FOLDER / name, quality=90)
        print(FOLDER / name)


if __name__ == "__main__":
    main()

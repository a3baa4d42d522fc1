"""200 pictures of mannequins in the layouts of the published data sets and of a shop's own folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from truepose_core.datasets.pairs import in_shop_name
from truepose_core.mannequin import render_people
from truepose_core.pose import Person, Pose, write_pose

PEOPLE, POSES = 50, 4
HEIGHT, WIDTH = 64, 44
"""Of the aspect that CFLD's keypoints are in, 256x176."""


class People:
    """50 people in 4 poses: bytes [H, W, 3], labels [H, W] and keypoints [18, 3] of number n."""

    def __init__(self, people: int = PEOPLE):
        made = render_people(range(people), POSES, "train", height=HEIGHT, width=WIDTH)
        self.count = people * POSES
        self.pixels = (made.image.permute(0, 2, 3, 1) * 255).round().byte().numpy()
        self.labels = made.parsing.argmax(1).byte().numpy()
        self.keypoints = made.keypoints.numpy()

    def listed(self, n: int) -> str:
        """The name in In-shop folders."""
        person, pose = divmod(n, POSES)
        return f"WOMEN/Dresses/id_{person:08d}/01_{pose}_front.jpg"

    def pairs(self, first: int = 0, last: int | None = None) -> list[tuple[int, int]]:
        """(source, target): each person's poses 1 to 3 from pose 0, of the people [first, last)."""
        people = range(first, self.count // POSES if last is None else last)
        return [(p * POSES, p * POSES + k) for p in people for k in range(1, POSES)]

    def save(self, path: Path, n: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.pixels[n]).save(path, quality=95)

    def in_shop(self, root: Path) -> None:
        for n in range(self.count):
            self.save(root / "img" / self.listed(n), n)

    def cfld(self, root: Path, spelling: str = "fashion") -> None:
        """In-shop folders with CFLD's csv files; the last tenth of the people is the test split."""
        self.in_shop(root)
        cut = self.count // POSES * 9 // 10
        for split, pairs in (("train", self.pairs(0, cut)), ("test", self.pairs(cut))):
            names = [tuple(in_shop_name(self.listed(n)) for n in pair) for pair in pairs]
            table = "from,to\n" + "".join(f"{a},{b}\n" for a, b in names)
            (root / f"{spelling}-resize-pairs-{split}.csv").write_text(table)
            rows = ["name:keypoints_y:keypoints_x"]
            for n in sorted({n for pair in pairs for n in pair}):
                there = self.keypoints[n][:, 2] > 0
                y, x = (
                    np.where(there, np.round(self.keypoints[n][:, axis] * side), -1).astype(int).tolist()
                    for axis, side in ((1, 256), (0, 176))
                )
                rows.append(f"{in_shop_name(self.listed(n))}: {y}: {x}")
            (root / f"{spelling}-resize-annotation-{split}.csv").write_text("\n".join(rows) + "\n")

    def pidm(self, root: Path) -> None:
        """In-shop folders with PIDM's lists, the target first, and a pose file per picture."""
        self.in_shop(root)
        lines = [f"img/{self.listed(b)},img/{self.listed(a)}" for a, b in self.pairs()]
        (root / "train_pairs.txt").write_text("\n".join(lines) + "\n")
        for n in range(self.count):
            path = (root / "pose" / self.listed(n)).with_suffix(".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            there = self.keypoints[n][:, 2:] > 0
            points = np.where(there, self.keypoints[n][:, :2] * (176, 256) + (40, 0), -1)
            np.savetxt(path, points, fmt="%.3f")

    def pcdms(self, root: Path) -> None:
        """Flat pictures in two sizes, a JSON list, and normalised pose files."""
        flat = [in_shop_name(self.listed(n)) for n in range(self.count)]
        for n, name in enumerate(flat):
            self.save(root / "all_data_png" / name.replace(".jpg", ".png"), n)
            small = root / "train_lst_256_png" / name.replace(".jpg", ".png")
            small.parent.mkdir(exist_ok=True)
            Image.fromarray(self.pixels[n]).resize((22, 32)).save(small)
            (root / "normalized_pose_txt").mkdir(exist_ok=True)
            points = np.where(self.keypoints[n][:, 2:] > 0, self.keypoints[n][:, :2], -1)
            np.savetxt(root / "normalized_pose_txt" / name.replace(".jpg", ".txt"), points, fmt="%.5f")
        listed = [{"source_image": flat[a], "target_image": flat[b]} for a, b in self.pairs()]
        (root / "train_data.json").write_text(json.dumps(listed))

    def groups(self, root: Path, count: int) -> None:
        """A folder of photos per person, with poses and label maps beside them."""
        for n in range(count):
            person, pose = divmod(n, POSES)
            self.save(root / f"garment {person}" / f"view.{pose}.png", n)
            self.beside(root / f"garment {person}", f"view.{pose}", n)

    def beside(self, folder: Path, stem: str, n: int) -> None:
        for part in ("parsing", "poses"):
            (folder / part).mkdir(exist_ok=True)
        Image.fromarray(self.labels[n]).save(folder / "parsing" / f"{stem}.png")
        pose = Pose(WIDTH, HEIGHT, (Person(self.keypoints[n]),))
        (folder / "poses" / f"{stem}.json").write_text(json.dumps(write_pose(pose)[0]))

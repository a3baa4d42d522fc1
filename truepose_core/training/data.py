"""Training pairs from the mannequin world: a pool of people that is slowly replaced, fixed by (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing


@dataclass(frozen=True)
class TrainingBatch:
    """S sources and B = S r targets; r targets in a row show the same person as their source.

    images [., 3, H, W] in [0, 1]; parsings; keypoints [., 18, 3] normalised. source_pose, target_pose: their bodies, or
    None where they are not known.
    """

    source_image: Tensor
    source_parsing: HumanParsing
    source_body: Tensor
    target_image: Tensor
    target_parsing: HumanParsing
    target_body: Tensor
    source_pose: BodyPose | None = None
    target_pose: BodyPose | None = None

    def to(self, device: torch.device) -> TrainingBatch:
        return TrainingBatch(*(None if x is None else x.to(device) for x in vars(self).values()))


def _as_bytes(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8).cpu()


class MannequinPool:
    """`people` persons in `poses` poses each, rendered; every step replaces `fresh` of them by new ones.

    What the pool holds at a step depends on (seed, step) alone, so a resumed run sees what an unbroken one would.
    """

    def __init__(
        self,
        people: int,
        poses: int,
        size: tuple[int, int],
        seed: int = 0,
        fresh: int = 1,
        step: int = 0,
        device: torch.device | str = "cpu",
        ambiguous: float = 0.0,
    ):
        """ambiguous: share of the poses whose keypoints do not tell their depth (`mannequin.twins`)."""
        if poses < 2:
            raise TruePoseError(f"a pair needs 2 poses of a person; got {poses}")
        self.people, self.poses, self.size, self.seed = people, poses, size, seed
        self.fresh, self.ambiguous = min(fresh, people), ambiguous
        self.device = torch.device(device)
        self.step = step
        replaced = self.fresh * step
        slots = torch.arange(people)
        # Slot s was last filled by the newest person number p <= replaced + people - 1 with p = s modulo `people`.
        self.person = slots + (replaced + people - 1 - slots) // people * people
        height, width = size
        self.image = torch.empty((people, poses, 3, height, width), dtype=torch.uint8)
        self.parsing = torch.empty((people, poses, 7, height, width), dtype=torch.uint8)
        self.body = torch.empty((people, poses, 18, 3))
        self.theta = torch.empty((people, poses, 24, 3))
        self.beta = torch.empty((people, poses, 10))
        self.camera = torch.empty((people, poses, 3))
        for chunk in slots.split(32):
            self._fill(chunk)

    def _fill(self, slots: Tensor) -> None:
        from truepose_core.mannequin import render_people

        made = render_people(
            self.person[slots],
            self.poses,
            "train",
            seed=self.seed,
            height=self.size[0],
            width=self.size[1],
            device=self.device,
            ambiguous=self.ambiguous,
        )
        shape = (len(slots), self.poses)
        self.image[slots] = _as_bytes(made.image).unflatten(0, shape)
        self.parsing[slots] = _as_bytes(made.parsing).unflatten(0, shape)
        self.body[slots] = made.keypoints.cpu().unflatten(0, shape)
        for name in ("theta", "beta", "camera"):
            getattr(self, name)[slots] = getattr(made, name).cpu().unflatten(0, shape)

    def batch(self, sources: int, targets: int, rank: int = 0) -> TrainingBatch:
        """The batch of the current step: `sources` people with `targets` target poses each. Raises TruePoseError where
        the pool has too few poses for that."""
        if not 1 <= targets < self.poses:
            raise TruePoseError(
                f"{targets} targets from {self.poses} poses per person, one of which is the source; "
                f"expected 1 to {self.poses - 1}"
            )
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) * 4099 + rank)
        slot = torch.randint(self.people, (sources,), generator=generator)
        order = torch.rand((sources, self.poses), generator=generator).argsort(1)[:, : targets + 1]
        source, target = order[:, 0], order[:, 1:]
        rows = slot[:, None].expand(-1, target.shape[1]).reshape(-1)
        target = target.reshape(-1)

        def parse(x: Tensor) -> HumanParsing:
            masks = x.float()
            return HumanParsing(masks / masks.sum(1, keepdim=True))

        def bodies(*at: Tensor) -> BodyPose:
            return BodyPose(self.theta[at], self.beta[at], self.camera[at])

        return TrainingBatch(
            self.image[slot, source].float() / 255,
            parse(self.parsing[slot, source]),
            self.body[slot, source],
            self.image[rows, target].float() / 255,
            parse(self.parsing[rows, target]),
            self.body[rows, target],
            bodies(slot, source),
            bodies(rows, target),
        )

    def advance(self) -> None:
        """Go to the next step and replace the oldest people."""
        first = self.fresh * self.step
        self.step += 1
        slots = torch.arange(first, first + self.fresh) % self.people
        self.person[slots] += self.people
        if self.fresh:
            self._fill(slots)

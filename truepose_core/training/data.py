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
    None where they are not known. twin: [B / 2] bool, whether targets 2 i and 2 i + 1 have the same keypoints and
    another depth (`mannequin.twins`), or None for no twins.
    """

    source_image: Tensor
    source_parsing: HumanParsing
    source_body: Tensor
    target_image: Tensor
    target_parsing: HumanParsing
    target_body: Tensor
    source_pose: BodyPose | None = None
    target_pose: BodyPose | None = None
    twin: Tensor | None = None

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
        twins: float = 0.0,
    ):
        """twins: share of the pairs of targets that have the same keypoints and another depth (`mannequin.twins`).
        Where there are any, a person's first pose is the source of every batch and the others come in pairs: `poses`
        is odd.
        """
        if twins > 0 and poses % 2 == 0:
            raise TruePoseError(f"twins come in pairs beside the source; got {poses} poses, expected an odd number")
        if poses < 2:
            raise TruePoseError(f"a pair needs 2 poses of a person; got {poses}")
        self.people, self.poses, self.size, self.seed = people, poses, size, seed
        self.fresh, self.twins = min(fresh, people), twins
        self.twin = torch.zeros((people, poses // 2), dtype=torch.bool)
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
        from truepose_core.mannequin import render_people, render_twins

        height, width = self.size
        how = {"seed": self.seed, "height": height, "width": width, "device": self.device}
        if self.twins > 0:
            made, twin = render_twins(self.person[slots], self.poses // 2, self.twins, "train", **how)
            self.twin[slots] = twin
        else:
            made = render_people(self.person[slots], self.poses, "train", **how)
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
        twin = None
        if self.twins > 0:
            if targets % 2:
                raise TruePoseError(
                    f"{targets} targets of each source; expected an even number, as twins come in pairs"
                )
            pair = torch.rand((sources, self.poses // 2), generator=generator).argsort(1)[:, : targets // 2]
            order = torch.cat(
                [torch.zeros_like(pair[:, :1]), torch.stack([2 * pair + 1, 2 * pair + 2], 2).flatten(1)], 1
            )
            twin = self.twin[slot[:, None], pair].flatten()
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
            twin,
        )

    def advance(self) -> None:
        """Go to the next step and replace the oldest people."""
        first = self.fresh * self.step
        self.step += 1
        slots = torch.arange(first, first + self.fresh) % self.people
        self.person[slots] += self.people
        if self.fresh:
            self._fill(slots)

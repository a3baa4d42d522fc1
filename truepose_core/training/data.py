"""Training pairs from the mannequin world: a pool of people that is slowly replaced, fixed by (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from truepose_core.alignment.recurrent import AlignedPerson, align_bodies
from truepose_core.body.lift import lift
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing


@dataclass(frozen=True)
class TrainingBatch:
    """S sources and B = S r targets; r targets in a row show the same person as their source.

    images [., 3, H, W] in [0, 1]; parsings; keypoints [., 18, 3] normalised. source_pose, target_pose: their bodies, or
    None where they are not known. twin: [B / 2] bool, whether targets 2 i and 2 i + 1 have the same keypoints and
    another depth (`mannequin.twins`), or None for no twins. lifted: the bodies of source and target [B] each, lifted
    from the keypoints as at inference, and aligned: what alignment makes of each pair; None where that is not prepared.
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
    lifted: tuple[BodyPose, BodyPose] | None = None
    aligned: AlignedPerson | None = None

    def to(self, device: torch.device) -> TrainingBatch:
        """The same elsewhere, but for what was prepared, which stays on the CPU."""
        prepared = ("lifted", "aligned")
        return TrainingBatch(*(x if x is None or name in prepared else x.to(device) for name, x in vars(self).items()))


_BODY = ("theta", "beta", "camera")
_ALIGNED = {"picture": 3, "seen": 1, "parsing": 7}


def _as_bytes(x: Tensor) -> Tensor:
    return (x * 255).round().to(torch.uint8).cpu()


PREPARED = ("nothing", "bodies", "alignment")


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
        first_source: bool = False,
        prepare: str = "nothing",
        quiet: bool = True,
    ):
        """twins: share of the pairs of targets that have the same keypoints and another depth (`mannequin.twins`).
        Where there are any, a person's first pose is the source of every batch and the others come in pairs: `poses`
        is odd. first_source: the same without twins. prepare: what is lifted ("bodies") and aligned as well
        ("alignment", for first sources) when people are made, and not anew in each batch. quiet: no progress bar.
        """
        from tqdm.auto import tqdm

        if prepare not in PREPARED:
            raise TruePoseError(f"prepare is {prepare!r}; expected one of {', '.join(PREPARED)}")
        if prepare == "alignment" and not (first_source or twins > 0):
            raise TruePoseError("alignment is prepared for pairs that start at a person's first pose")
        if twins > 0 and poses % 2 == 0:
            raise TruePoseError(f"twins come in pairs beside the source; got {poses} poses, expected an odd number")
        if poses < 2:
            raise TruePoseError(f"a pair needs 2 poses of a person; got {poses}")
        self.people, self.poses, self.size, self.seed = people, poses, size, seed
        self.fresh, self.twins = min(fresh, people), twins
        self.first_source, self.prepare = first_source or twins > 0, prepare
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
        self.lifted = {name: torch.empty_like(getattr(self, name)) for name in _BODY} if prepare != "nothing" else {}
        self.aligned: dict[str, Tensor] = {}
        if prepare == "alignment":
            for name, channels in _ALIGNED.items():
                self.aligned[name] = torch.empty((people, poses, channels, height, width), dtype=torch.uint8)
        with tqdm(total=people, desc="rendering people", unit="person", disable=quiet, leave=False) as bar:
            for chunk in slots.split(16):
                self._fill(chunk)
                bar.update(len(chunk))

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
        for name in _BODY:
            getattr(self, name)[slots] = getattr(made, name).cpu().unflatten(0, shape)
        if self.prepare != "nothing":
            for slot in slots.tolist():
                self._prepare(slot)

    def _prepare(self, slot: int) -> None:
        """Lift the person in this slot, with the shape of the first pose, and align that to the others. One person at a
        time: what is computed for several together differs in the last digits, and a resumed run must see the same."""
        height, width = self.size
        points = self.body[slot]
        first = lift(points[:1], width / height).bodies
        others = lift(points[1:], width / height, shape=first.beta.repeat(self.poses - 1, 1)).bodies
        for name in _BODY:
            self.lifted[name][slot] = torch.cat([getattr(first, name), getattr(others, name)])
        if self.prepare == "bodies":
            return
        count = self.poses - 1
        image, masks = self.image[slot, :1].float() / 255, self.parsing[slot, :1].float()
        parsing = HumanParsing((masks / masks.sum(1, keepdim=True)).expand(count, -1, -1, -1))
        made = align_bodies(image.expand(count, -1, -1, -1), parsing, first.repeat(count), others, points[1:])
        for name, value in (("picture", made.picture), ("seen", made.seen), ("parsing", made.parsing.masks)):
            self.aligned[name][slot, 1:] = _as_bytes(value)

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
        elif self.first_source:
            order = torch.rand((sources, self.poses - 1), generator=generator).argsort(1)[:, :targets] + 1
            order = torch.cat([torch.zeros_like(order[:, :1]), order], 1)
        source, target = order[:, 0], order[:, 1:]
        rows = slot[:, None].expand(-1, target.shape[1]).reshape(-1)
        target = target.reshape(-1)

        def parse(x: Tensor) -> HumanParsing:
            masks = x.float()
            return HumanParsing(masks / masks.sum(1, keepdim=True))

        def bodies(*at: Tensor) -> BodyPose:
            return BodyPose(self.theta[at], self.beta[at], self.camera[at])

        lifted = aligned = None
        if self.prepare != "nothing":
            at = (rows, source.repeat_interleave(targets)), (rows, target)
            lifted = tuple(BodyPose(*(self.lifted[name][index] for name in _BODY)) for index in at)
        if self.prepare == "alignment":
            picture, seen = (self.aligned[name][rows, target].float() / 255 for name in ("picture", "seen"))
            aligned = AlignedPerson(picture, seen, parse(self.aligned["parsing"][rows, target]), *lifted)
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
            lifted,
            aligned,
        )

    def advance(self) -> None:
        """Go to the next step and replace the oldest people."""
        first = self.fresh * self.step
        self.step += 1
        slots = torch.arange(first, first + self.fresh) % self.people
        self.person[slots] += self.people
        if self.fresh:
            self._fill(slots)

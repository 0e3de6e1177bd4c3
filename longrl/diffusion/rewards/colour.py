"""Rewards for the colours of a generated picture or video: closed forms, for tests, demos and teaching.

Letters: F frames, H and W pixels. A video counts as all its frames together.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from longrl.types import Row

PALETTE: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128),
    "red": (230, 30, 30), "green": (30, 170, 60), "blue": (30, 60, 230),
    "yellow": (240, 220, 40), "orange": (240, 140, 30), "purple": (140, 50, 190),
    "pink": (245, 150, 190), "brown": (120, 75, 35), "cyan": (40, 210, 220),
}  # fmt: skip
"""Name -> RGB from 0 to 255."""

Place = Literal["left", "right", "top", "bottom"]
PLACES: tuple[Place, ...] = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class ColourReward:
    """Base of rewards that look for one colour."""

    colour: str | None = None
    """A name of `PALETTE`; None for the first one in the prompt."""

    def __post_init__(self) -> None:
        if self.colour is not None and self.colour not in PALETTE:
            raise ValueError(f"the colour of a reward must be one of {', '.join(PALETTE)}, got {self.colour!r}")

    def expected_colour(self, row: Row) -> str:
        """The name of the colour that a sample should have; raises ValueError if its prompt names none."""
        return self.colour or first_word(row, PALETTE)


@dataclass(frozen=True)
class MeanColour(ColourReward):
    """How close the mean colour is to a target: 1 - (mean over R, G, B of |mean pixel - target|) / 255.

    It changes with every pixel, so even a policy far from the colour has something to learn from.

    Example:
        `MeanColour("red")`; `MeanColour()` takes the first colour that the prompt names.
    """

    def __call__(self, frames: Tensor, row: Row) -> float:
        """The reward of one sample, in [0, 1].

        Args:
            frames: [F, 3, H, W] uint8 RGB.
            row: its prompt.
        """
        target = PALETTE[self.expected_colour(row)]
        sums = frames.sum(dim=(0, 2, 3)).tolist()  # of integers, exact
        count = frames.numel() // 3
        return 1 - sum(abs(total / count - value) for total, value in zip(sums, target, strict=True)) / 3 / 255


@dataclass(frozen=True)
class ColourShare(ColourReward):
    """Share of the pixels that have a colour, in [0, 1]: no other colour of `PALETTE` is nearer in RGB.

    Example:
        `ColourShare("blue")`; `ColourShare()` takes the first colour that the prompt names.
    """

    def __call__(self, frames: Tensor, row: Row) -> float:
        """The reward of one sample; see `MeanColour.__call__`."""
        return float(has_colour(frames, self.expected_colour(row)).double().mean())


@dataclass(frozen=True)
class ColourPlace(ColourReward):
    """A colour's place, right or wrong: (1 + share in that half - share in the other half) / 2.

    1 for "red on the left" if the left half is red and the right one has none; 1/2 if it is nowhere, or everywhere.

    Example:
        `ColourPlace("red", "left")`; `ColourPlace()` takes the first colour and the first place that the prompt
        names.
    """

    place: Place | None = None
    """Half of the picture; None for the first of `PLACES` in the prompt."""

    def __call__(self, frames: Tensor, row: Row) -> float:
        """The reward of one sample; see `MeanColour.__call__`."""
        matches = has_colour(frames, self.expected_colour(row)).double()  # [F, H, W]
        place = self.place or first_word(row, PLACES)
        lines = matches.mean(dim=(0, 2) if place in ("top", "bottom") else (0, 1))  # [H] or [W]
        size = len(lines) // 2  # of an odd number the middle line belongs to no half
        first = float(lines[:size].mean())
        last = float(lines[-size:].mean())
        return (1 + (first - last if place in ("left", "top") else last - first)) / 2


def has_colour(frames: Tensor, colour: str) -> Tensor:
    """[F, H, W] bool: which pixels of frames [F, 3, H, W] are nearer to `colour` than to all others of `PALETTE`."""
    palette = frames.new_tensor(list(PALETTE.values())).float()  # [C, 3]
    squares = palette.square().sum(dim=1)
    # |pixel - c|^2 less |pixel|^2, which all colours share: integers below 2^24, so exact in float32.
    nearest = [(squares - 2 * frame.float().movedim(0, -1) @ palette.T).argmin(dim=-1) for frame in frames]  # [H, W]
    return torch.stack(nearest) == list(PALETTE).index(colour)


def first_word(row: Row, known: dict[str, tuple[int, int, int]] | tuple[Place, ...]) -> str:
    """The first of the known words in a prompt.

    Raises:
        ValueError: it has none.
    """
    word = next((word for word in re.findall(r"[a-z]+", row.problem.lower()) if word in known), None)
    if word is None:
        raise ValueError(f"prompt {row.problem!r} names none of {', '.join(known)}; name one, or set it in the reward")
    return word

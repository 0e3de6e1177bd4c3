"""A video within a fixed number of tokens: features of neighbouring times that hardly differ are merged.

Temporal patches come in windows of a few. The first of a window keeps all its features, every other one the same number
of them: those that differ most from the feature at the same place one temporal patch before. What is not kept is
averaged into the last kept feature at its place. So the number of tokens is known before anything is encoded, and what
stands where is not: features bring their places, height and width, as two further columns, from the encoder through
every cache to the text stack, which adds them to the positions of the placeholders.

As DyCoke's merging in time (arXiv:2411.15024), whose windows drop a fixed share of their later frames' tokens, and by
the measure of vLLM's EVS (arXiv:2510.14624), 1 - cosine. EVS compares over a whole video and keeps any number of a
patch's tokens, so that a prompt's tokens would depend on features, and what a rank keeps on another rank's.

Letters: T temporal patches, W windows of r of them, n features of a temporal patch, q of them kept, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longrl.models.patching import GridTHW
from longrl.types import UnusableSample

PLACE_COLUMNS = 2
"""Behind a row's features: its place along height and along width."""
MAX_SIDE = 256
"""Places that the precision of features can tell apart: bfloat16 has 8 bits."""


@dataclass(frozen=True)
class TokenMerging:
    """How many features of each video remain, and among which times they are sought.

    Example:
        `TokenMerging(budget=100, window=4).rows_of_patches(8, (4, 4))` is 16, 11, 11, 11, 16, 11, 11, 11.
    """

    budget: int
    """Tokens of a video, at most."""
    window: int
    """Temporal patches of a window: what ranks share a video by."""

    def rows_of_patches(self, num_patches: int, sides: tuple[int, int]) -> list[int]:
        """Features that remain of each temporal patch of a video.

        Args:
            num_patches: of the whole video.
            sides: features of a temporal patch along height and width.

        Raises:
            UnusableSample: the budget is below the first patch of every window and one feature of each other.
        """
        height, width = sides
        size = height * width
        if max(sides) > MAX_SIDE:
            raise UnusableSample(
                None,
                f"frames may have {MAX_SIDE} features along a side with max_kept_tokens, but these have {height} x "
                f"{width}; lower model.family.init_args.max_pixels, or leave the row out",
            )
        num_windows = -(-num_patches // self.window)
        num_others = num_patches - num_windows
        room = self.budget - num_windows * size
        if room < num_others:
            raise UnusableSample(
                None,
                f"{num_patches} temporal patches of {size} features in windows of {self.window} keep "
                f"{num_windows * size + num_others} at least, but max_kept_tokens={self.budget}; raise it or "
                "merge_window, or show fewer or smaller frames",
            )
        kept = min(size, room // num_others) if num_others else 0
        return [kept if index % self.window else size for index in range(num_patches)]

    def merge(self, rows: Tensor, grid: GridTHW, kept: int, width: int) -> Tensor:
        """What remains of whole windows, the last of which may be shorter, with its places.

        Args:
            rows: [T * n, D].
            grid: T and the sides of a temporal patch.
            kept: features of each temporal patch but a window's first.
            width: columns, from the first on, that are compared: deeper levels go with them.

        Returns:
            [W * n + (T - W) * kept, D + 2].
        """
        num_patches, height, across = grid
        precise = rows.to(torch.promote_types(rows.dtype, torch.float32)).view(num_patches, height * across, -1)
        full = num_patches // self.window * self.window
        parts = []
        for part, length in ((precise[:full], self.window), (precise[full:], num_patches - full)):
            if len(part):
                parts.append(_merge_windows(part.unflatten(0, (-1, length)), kept, width))
        merged = torch.cat([values for values, _ in parts])
        places = torch.cat([indices for _, indices in parts])
        columns = torch.stack([places // across, places % across], 1).to(rows.dtype)
        return torch.cat([merged.to(rows.dtype), columns], 1)


def without_places(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D] features and [N, 2] int64 places of rows that hold both."""
    return rows[:, :-PLACE_COLUMNS], rows[:, -PLACE_COLUMNS:].detach().long()


def _merge_windows(windows: Tensor, kept: int, width: int) -> tuple[Tensor, Tensor]:
    """[W, r, n, D] features of windows -> rows that remain, window by window, time by time, and their places.

    Which ones are kept has no gradient; what becomes of their values has.
    """
    count, length, size, _ = windows.shape
    compared = windows.detach()[..., :width]
    change = 1 - F.cosine_similarity(compared[:, 1:], compared[:, :-1], dim=-1)  # [W, r - 1, n]
    # Of equal ones the first, on every device.
    chosen = change.argsort(dim=-1, descending=True, stable=True)[..., :kept].sort(-1).values  # [W, r - 1, q]
    is_kept = torch.zeros_like(change, dtype=torch.bool).scatter(-1, chosen, True)

    # From the last time back: a feature takes up those behind it until the next one that is kept.
    every = torch.arange(size, device=windows.device).expand(count, -1)
    total = torch.zeros_like(windows[:, 0])  # [W, n, D]
    number = torch.zeros_like(total[..., :1])  # [W, n, 1]
    rows: list[Tensor] = []
    places: list[Tensor] = []
    for index in reversed(range(length)):
        total = total + windows[:, index]
        number = number + 1
        at = every if index == 0 else chosen[:, index - 1]  # [W, n or q]
        rows.append((total / number).take_along_dim(at[..., None], 1))
        places.append(at)
        if index:
            ends = is_kept[:, index - 1, :, None]
            total = total.masked_fill(ends, 0)
            number = number.masked_fill(ends, 0)
    return torch.cat(rows[::-1], 1).flatten(0, 1), torch.cat(places[::-1], 1).flatten()

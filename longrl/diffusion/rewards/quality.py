"""No-reference quality of generated pictures: BRISQUE by the `brisque` package, which brings its model along.

Of the other libraries, `piq` and `pyiqa` download the weights of theirs from the network, and torchmetrics has no
BRISQUE (its ARNIQA and CLIP-IQA download too). Extra: `brisque`; one of its dependencies is compiled by a C++ compiler.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from longrl.diffusion.rewards.required_packages import require_packages
from longrl.rewards.batch import SampleReward

if TYPE_CHECKING:
    from torch import Tensor

    from longrl.types import Row


@dataclass(frozen=True)
class Brisque(SampleReward["Tensor"]):
    """1 - clamp(BRISQUE, 0, 100) / 100, mean over frames: near 1 for a natural, undistorted picture.

    BRISQUE (Mittal et al., IEEE TIP 2012, doi:10.1109/TIP.2012.2214050) measures how the statistics of neighbouring
    pixels differ from those of natural photographs. Drawings and plain areas are far from them, and prompts play no
    part: it belongs beside a reward for what is shown. A frame in one plain colour has no such statistics, and its
    sample is masked.
    """

    def prepare(self) -> None:
        """Loads the model.

        Raises:
            ValueError: the package is not installed.
        """
        require_packages("brisque", "cv2", reward="Brisque", extra="brisque")
        _ = self._score

    def score_one(self, completion: Tensor, row: Row) -> float:
        """The reward of a sample [F, 3, H, W] uint8 RGB."""
        scores = [self.score_frame(frame) for frame in completion]
        return sum(1 - min(max(score, 0.0), 100.0) / 100 for score in scores) / len(scores)

    def score_frame(self, frame: Tensor) -> float:
        """BRISQUE of a frame [3, H, W] uint8 RGB: 0 is best, 100 bad, and values go beyond both.

        Raises:
            ValueError: the frame has no such statistics.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # divisions by zero end in the error below
            value = float(self._score(frame.movedim(0, -1).contiguous().cpu().numpy()))
        if not math.isfinite(value):
            raise ValueError(f"BRISQUE of a frame is {value}, as it is where neighbouring pixels are all alike")
        return value

    @cached_property
    def _score(self) -> Callable[[Any], float]:
        from brisque import BRISQUE

        return BRISQUE().score

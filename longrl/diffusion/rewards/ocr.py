"""Reward for a picture that shows the text its prompt asks for.

The text is read by RapidOCR (PP-OCR models by ONNX Runtime), whose package brings its models along: nothing is
downloaded. Extra: `diffusion-rewards`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from longrl.diffusion.rewards.required_packages import require_packages
from longrl.io.number_ranges import COUNT, check_ranges
from longrl.rewards.batch import SampleReward

if TYPE_CHECKING:
    from torch import Tensor

    from longrl.types import Row

QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d|\u00ab([^\u00bb]+)\u00bb')


@dataclass(frozen=True)
class OcrMatch(SampleReward["Tensor"]):
    """1 if what is read holds what was asked for, else max(1 - D / N, 0), mean over frames: Flow-GRPO's released rule.

    D is the least number of characters to insert, delete or replace between what is read and what was asked for, N the
    number of characters asked for: the row's `answer`, or the prompt's text in double quotes, several of them joined.
    The paper (arXiv:2505.05470, sec. 4) has max(1 - D / N, 0) alone, `contained=False`.
    A picture of 512 x 512 takes about 0.1 s of one core.
    Of videos that code has the paper's rule and another mean: configs/reward/video_ocr.yaml.
    Case, spaces and ways to write a character (width, accents composed or not) make no difference.

    Example:
        A picture of a sign "OPEN 24" gets 1 for the prompt 'a shop with a sign that says "Open 24"', and "OPEN" 0.67;
        "WE OPEN 24 H" gets 1 too, and 0.5 by the paper's rule.
    """

    contained: bool = True
    """The whole text asked for earns 1 whatever is read before and behind it."""

    anywhere: bool = False
    """Take D against the best matching part of what is read: other text beside a part of it costs nothing either."""
    earning_frames: bool = False
    """Take the mean over the frames that earn anything, 0 if none does, in place of all frames."""
    detection_side: int = 320
    """A picture whose shorter side has fewer pixels is enlarged to so many before text is searched. RapidOCR's own 736
    takes twice the time on pictures of 512 x 512 and read drawn words of 16 to 40 pixels no better."""
    num_threads: int = -1
    """Threads of ONNX Runtime; -1 for all cores."""

    def __post_init__(self) -> None:
        check_ranges(self, "OcrMatch: ", detection_side=COUNT)
        if self.num_threads < 1 and self.num_threads != -1:
            raise ValueError(f"OcrMatch: num_threads must be at least 1, or -1 for all cores, got {self.num_threads}")

    def prepare(self) -> None:
        """Loads the reader.

        Raises:
            ValueError: the packages are not installed.
        """
        require_packages("rapidocr", "onnxruntime", reward="OcrMatch", extra="diffusion-rewards")
        _ = self._reader

    def score_one(self, completion: Tensor, row: Row) -> float:
        """The reward of a sample [F, 3, H, W] uint8 RGB.

        Raises:
            ValueError: its prompt asks for no text.
        """
        target = comparable_text(row.answer or quoted_text(row.problem))
        if not target:
            raise ValueError(f"the text that prompt {row.problem!r} asks for has no characters")
        texts = [comparable_text(self.read_text(frame)) for frame in completion]
        scores = [text_similarity(text, target, contained=self.contained, anywhere=self.anywhere) for text in texts]
        if self.earning_frames:
            scores = [score for score in scores if score > 0] or [0.0]
        return sum(scores) / len(scores)

    def read_text(self, frame: Tensor) -> str:
        """All text in a frame [3, H, W] uint8 RGB, line by line from the top; empty if there is none."""
        pixels = frame.flip(0).movedim(0, -1).contiguous().cpu().numpy()  # OpenCV's order, BGR
        return " ".join(self._reader(pixels).txts or ())

    @cached_property
    def _reader(self) -> Callable[[Any], Any]:
        from rapidocr import RapidOCR

        options = {"Global.log_level": "error", "Det.limit_side_len": self.detection_side}
        threads = {"EngineConfig.onnxruntime.intra_op_num_threads": self.num_threads}
        return RapidOCR(params=options | threads)


def quoted_text(prompt: str) -> str:
    """The text in double quotes in a prompt, several joined by a space.

    Raises:
        ValueError: nothing does.
    """
    quotes = ["".join(groups) for groups in QUOTED.findall(prompt)]
    if not quotes:
        raise ValueError(f'a prompt for OCR must hold its text in double quotes, got {prompt!r}; write "text"')
    return " ".join(quotes)


def comparable_text(text: str) -> str:
    """Text as it is compared: one spelling of every character, lower case, without spaces."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_similarity(text: str, target: str, *, contained: bool = False, anywhere: bool = False) -> float:
    """max(1 - distance / number of characters of the target, 0); with `contained` 1 if the text holds the target."""
    if contained and target in text:
        return 1.0
    return max(1 - edit_distance(target, text, anywhere=anywhere) / len(target), 0.0)


def edit_distance(target: str, text: str, *, anywhere: bool = False) -> int:
    """Characters to insert, delete or replace (Levenshtein); with `anywhere`, to the nearest part of `text`."""
    before = [0] * (len(text) + 1) if anywhere else list(range(len(text) + 1))
    for row, character in enumerate(target, start=1):
        after = [row]
        for column, other in enumerate(text, start=1):
            after.append(min(before[column] + 1, after[-1] + 1, before[column - 1] + (character != other)))
        before = after
    return min(before) if anywhere else before[-1]

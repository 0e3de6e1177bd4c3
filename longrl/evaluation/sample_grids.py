"""Grids of generated pictures and videos: under each prompt its samples side by side, under each what it got.

Letters: F frames (1 of a picture), H and W pixels.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from longrl.evaluation.report_page import Picture, evenly_spaced

INK, SOFT, PAPER = "#22303c", "#5b6773", "#ffffff"
"""Colours of the report's page: longrl/evaluation/templates/report.css.jinja."""
FOLDER = "pictures"
"""Folder of the grids in a run's; longrl/diffusion/picture_grids.py and longrl/callbacks/shown_frames.py write them."""
STAGES = {"step": "Training samples", "val": "Validation samples", "shown": "Frames that a completion asked for"}
"""First word of a grid's file -> what it shows."""
GAP = 8
"""Pixels between tiles."""
PROMPT_SIZE, CAPTION_SIZE = 14, 12
MAX_LINES = 2
LINE_SAMPLES = 4


@dataclass(frozen=True)
class PromptSamples:
    """One prompt of a grid."""

    prompt: str
    samples: Sequence[Tensor]
    """Each [F, 3, H, W] uint8 RGB."""
    captions: Sequence[str]
    """Text under each sample, such as its reward."""

    @property
    def num_frames(self) -> int:
        """F of the longest sample."""
        return max((len(frames) for frames in self.samples), default=0)


def is_video(rows: Sequence[PromptSamples]) -> bool:
    """True if any sample has more than one frame."""
    return any(row.num_frames > 1 for row in rows)


def picture_grid(rows: Sequence[PromptSamples], *, tile: int = 160, max_frames: int = 6) -> Image.Image:
    """One picture of all samples. Of videos it is a contact sheet: a sample per line, its frames from first to last.

    Prompts stand below each other; those with few pictures side by side, as long as a line has at most four.

    Args:
        rows: prompts with their samples.
        tile: pixels of the longer side of a frame; small frames are enlarged by a whole number, without smoothing.
        max_frames: of a longer video so many evenly spaced frames are shown.
    """
    if is_video(rows):
        return _page([_prompt_block(row, tile, "down", lambda n: evenly_spaced(n, max_frames)) for row in rows])
    return _moment_grid(rows, 0, tile)


def animated_grid(rows: Sequence[PromptSamples], *, tile: int = 160) -> list[Image.Image]:
    """The grid of every moment, all samples side by side; a video that has ended shows its last frame."""
    count = max((row.num_frames for row in rows), default=0)
    return [_moment_grid(rows, moment, tile) for moment in range(count)]


def encode_images(images: Sequence[Image.Image], kind: Literal["png", "webp", "gif"], *, fps: float = 8.0) -> bytes:
    """Images as the bytes of a file: one as PNG, or several as an animation that repeats for ever."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {}
    if kind != "png":
        options = {"save_all": True, "append_images": images[1:], "duration": round(1000 / fps), "loop": 0}
    if kind == "webp":
        options["quality"] = 85
    images[0].save(buffer, format=kind.upper(), **options)
    return buffer.getvalue()


def saved_grids(run: str | Path, *, count: int = 3) -> list[Picture]:
    """Reads what a run left in its folder, animations of videos: training samples, validation's, what tools showed.

    Args:
        run: folder of the run.
        count: at most so many of each, evenly spaced from the first to the last.
    """
    pictures = []
    for stage, name in STAGES.items():
        files = sorted(Path(run, FOLDER).glob(f"{stage}_*.png"))
        for index in evenly_spaced(len(files), count):
            title = f"{name} after step {int(files[index].stem.split('_')[1])}"
            animation = files[index].with_suffix(".webp")
            kind: Literal["png", "webp"] = "webp" if animation.exists() else "png"
            content = (animation if animation.exists() else files[index]).read_bytes()
            width = Image.open(io.BytesIO(content)).width
            pictures.append(Picture(title, content, width, kind, title=title))
    return pictures


# ---- parts of a grid ----


def _moment_grid(rows: Sequence[PromptSamples], moment: int, tile: int) -> Image.Image:
    """All samples at one moment; as many prompts in a line as their samples leave room for."""
    blocks = [_prompt_block(row, tile, "right", lambda n: [min(moment, n - 1)]) for row in rows]
    return _page(blocks, max(1, LINE_SAMPLES // max((len(row.samples) for row in rows), default=1)))


def _prompt_block(
    row: PromptSamples, tile: int, direction: Literal["right", "down"], choose: Callable[[int], list[int]]
) -> Image.Image:
    """A prompt above its samples: of each the frames that `choose` picks out of F, and its caption below."""
    samples = []
    for frames, caption in zip(row.samples, row.captions, strict=True):
        shown = _stacked([frame_image(frames[index], tile) for index in choose(len(frames))], "right")
        label = _label(caption, shown.width, CAPTION_SIZE, SOFT, bold=False)
        samples.append(_stacked([shown, label], "down", gap=2))
    block = _stacked(samples, direction)
    heading = _label(row.prompt, block.width, PROMPT_SIZE, INK, bold=True)
    return _stacked([heading, block], "down", gap=4)


def frame_image(frame: Tensor, tile: int) -> Image.Image:
    """A frame [3, H, W] uint8 with a longer side of at most `tile` pixels."""
    image = Image.fromarray(frame.movedim(0, -1).contiguous().cpu().numpy())
    longer = max(image.size)
    if longer <= tile:  # pixels of a tiny model's pictures stay squares
        scale = tile // longer
        return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * tile / longer)), max(1, round(image.height * tile / longer)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _page(parts: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    lines = [_stacked(parts[start : start + columns], "right") for start in range(0, len(parts), columns)]
    image = _stacked(lines, "down", gap=2 * GAP)
    page = Image.new("RGB", (image.width + 2 * GAP, image.height + 2 * GAP), PAPER)
    page.paste(image, (GAP, GAP))
    return page


def _stacked(images: Sequence[Image.Image], direction: Literal["right", "down"], gap: int = GAP) -> Image.Image:
    """One image of several, `gap` pixels between them."""
    axis = 0 if direction == "right" else 1
    size = [max((image.size[side] for image in images), default=1) for side in (0, 1)]
    size[axis] = max(1, sum(image.size[axis] + gap for image in images) - gap)
    page = Image.new("RGB", (size[0], size[1]), PAPER)
    start = 0
    for image in images:
        page.paste(image, (start, 0) if direction == "right" else (0, start))
        start += image.size[axis] + gap
    return page


def _label(text: str, width: int, size: int, ink: str, *, bold: bool) -> Image.Image:
    """A text on lines of at most `width` pixels, at most two: what is left out ends in dots."""
    letter_width = _font(size, bold).getlength("abcdefghij mnopqr") / 17
    num_letters = max(8, int(width / letter_width))
    lines = textwrap.wrap(text, num_letters, max_lines=MAX_LINES, placeholder=" ...") or [""]
    spacing = round(1.3 * size)
    page = Image.new("RGB", (width, spacing * len(lines)), PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(page).text((0, spacing * number), line, fill=ink, font=_font(size, bold))
    return page


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic and more."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)

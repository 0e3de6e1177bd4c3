"""Vision encoder of Qwen2.5-VL: a layer's windows in one call, against transformers' call per window.

The encoder has the released one's 32 layers, windows and full layers (every eighth), so calls are those of the 7B
model; it is narrow, for a CPU. A video of 16:9 is resized to 128 tokens per pair of frames at most (224 x 420): 8
windows, those at the right edge narrower. Both ways run in one process on the same weights and patches, in turns,
without gradient; each reports its median. Fields:

- frames: of the video.
- calls_loop, calls_varlen: calls of torch's attention for it, counted. On CPU longrl calls it once for each distinct
  length of a layer's sequences; on CUDA in half precision a layer is one varlen call of flash attention, whatever
  their lengths.
- loop_s, varlen_s: seconds of one pass through the encoder.
- max_difference: the largest between two features of a pass each.

    python bench/tower.py --json bench/results/tower.json
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Row, parse_arguments, report
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.packing.encoder_attention import ENCODER_ATTENTION_NAME
from longrl.testing.tiny import tiny_qwen2_5_vl
from longrl.types import Frames, Media

LOOP = "sdpa"
"""transformers' name of the attention that it calls once per window."""


@dataclass(frozen=True)
class Sizes:
    """What a run measures."""

    frames: tuple[int, ...] = (8, 32, 128, 256)
    repeats: int = 3
    height: int = 224
    width: int = 420
    vision: dict[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 64, "intermediate_size": 192, "depth": 32, "num_heads": 4,
            "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112,
        }
    )  # fmt: skip


FULL = Sizes()
QUICK = Sizes(frames=(8, 32), repeats=2)


class CountAttention(TorchFunctionMode):
    """Counts calls of torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def family_of(sizes: Sizes, folder: str | Path) -> Qwen2_5_VLFamily:
    """The model, its config and processor written to `folder`."""
    tiny_qwen2_5_vl(folder, vision=dict(sizes.vision))
    pixels = sizes.height * sizes.width
    return Qwen2_5_VLFamily(str(folder), random_init=True, max_pixels=pixels, min_pixels=pixels)


def video_of(sizes: Sizes, family: Qwen2_5_VLFamily, num_frames: int) -> Media:
    """A video of random pixels."""
    shape = (num_frames, 3, sizes.height, sizes.width)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    times = tuple(map(float, range(num_frames)))
    return family.patch(Frames("video", pixels, times, "video", float(num_frames)))


@torch.no_grad()
def encode(family: Qwen2_5_VLFamily, model: Any, attention: str, video: Media) -> tuple[Tensor, float]:
    """(features [N, D], seconds) with an attention of this name in the encoder."""
    model.set_attn_implementation({"vision_config": attention})
    start = time.perf_counter()
    (features,) = family.encode_media(model, [video])
    return features, time.perf_counter() - start


def measure(sizes: Sizes, family: Qwen2_5_VLFamily, model: Any, num_frames: int) -> Row:
    """A row of the table."""
    video = video_of(sizes, family, num_frames)
    calls: dict[str, int] = {}
    features: dict[str, Tensor] = {}
    for attention in (LOOP, ENCODER_ATTENTION_NAME):  # not timed: the first pass of a size, and counting
        with CountAttention() as count:
            features[attention], _ = encode(family, model, attention, video)
        calls[attention] = count.calls
    difference = (features[LOOP] - features[ENCODER_ATTENTION_NAME]).abs().max()

    loop_s: list[float] = []
    varlen_s: list[float] = []
    for _ in range(sizes.repeats):
        loop_s.append(encode(family, model, LOOP, video)[1])
        varlen_s.append(encode(family, model, ENCODER_ATTENTION_NAME, video)[1])
    return {
        "frames": num_frames,
        "calls_loop": calls[LOOP],
        "calls_varlen": calls[ENCODER_ATTENTION_NAME],
        "loop_s": statistics.median(loop_s),
        "varlen_s": statistics.median(varlen_s),
        "max_difference": float(difference),
    }


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command; `sizes` replaces what `--quick` or its absence choose."""
    arguments = parse_arguments(__doc__, argv)
    sizes = sizes or (QUICK if arguments.quick else FULL)
    with tempfile.TemporaryDirectory() as folder:
        family = family_of(sizes, folder)
        model = family.build()
        rows = [measure(sizes, family, model, count) for count in sizes.frames]
    settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(sizes).items())
    report(__file__, arguments, rows, notes=[f"sizes: {settings}"])


if __name__ == "__main__":
    main()

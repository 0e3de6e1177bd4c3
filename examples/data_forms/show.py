"""What a model is shown of a data set's first record: the files of this folder print it."""

from __future__ import annotations

from typing import Any

from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.sampling import VideoSampling
from longrl.io.shipped_files import shipped
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.types import Prompt


def show(train: Any, **options: Any) -> Prompt:
    """The first training prompt of a data set, printed.

    Args:
        train: value of `data.train`.
        options: other options of `data`.
    """
    family = Qwen2_5_VLFamily(str(shipped("configs/demo/base")), max_pixels=3136)
    data = LongVideoReason(
        family, train=train, stage="sft", video=VideoSampling(fps=0.5), prompts_per_batch=1, **options
    )
    data.setup("fit")
    (prompt,) = next(iter(data.train_dataloader())).prompts
    times = ", ".join(f"{time:.1f}" for time in prompt.frame_times[0])
    print(f"rows:    {len(data.datasets['train'])}")
    print(f"video:   {prompt.row.videos[0]}")
    print(f"frames:  {len(prompt.frame_times[0])}, at {times} s")
    print(f"prompt:  {len(prompt.input_ids)} tokens")
    print(f"target:  {family.tokenizer.decode(prompt.response.token_ids)}")
    return prompt

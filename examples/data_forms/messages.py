"""Conversational records: `messages` with a video, as OpenAI's and Hugging Face's libraries write them.

The chat is shown as it is, and its last answer is the SFT target; RL and evaluation judge by `answer`. From the
repository's root:

    python examples/data_forms/messages.py runs/data_forms/messages
"""

from __future__ import annotations

import sys
from pathlib import Path

from show import show

from longrl.io.jsonl import write_jsonl
from longrl.testing.example_clips import write_example_clips
from longrl.types import Prompt


def main(folder: str) -> Prompt:
    """Writes a record of `messages` and shows what becomes of it."""
    write_example_clips(folder, num_videos=1)
    record = {
        "messages": [
            {"role": "system", "content": "Answer in one word."},
            {
                "role": "user",
                "content": [
                    {"type": "video", "video": "train_000000.mp4"},
                    {"type": "text", "text": "Who walks around?"},
                ],
            },
            {"role": "assistant", "content": "<think>It is orange.</think><answer>robot</answer>"},
        ],
        "answer": "robot",
        "task": "exact",
    }
    file = write_jsonl(Path(folder, "messages.jsonl"), [record])
    return show(str(file))


if __name__ == "__main__":
    main(sys.argv[1])

"""longrl as a model of VLMEvalKit, written for its 0.2rc1 (e8e78f05); only `vlmevalkit_run` imports this file."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vlmeval.vlm.base import BaseModel

from longrl.evaluation.answering import hash_json
from longrl.harness.answerer import HarnessAnswerer, asked_frames


class LongRL(BaseModel):
    """A policy of `python -m longrl evaluate`; its options are those of `HarnessAnswerer.from_options`.

    VLMEvalKit says how many frames a data set shows (`Video-MME_8frame`) by setting `nframe` or `fps`, and asks one
    question after the other. How answers are sampled it leaves to the model: `sampling` of the config.

    Args:
        frames: `task` shows as many frames as the data set says; `own` those of `data.video`.
        options: see `HarnessAnswerer.from_options`.
    """

    INTERLEAVE = True
    VIDEO_LLM = True

    def __init__(self, frames: str = "task", **options: Any) -> None:
        super().__init__()
        if frames not in ("task", "own"):
            raise ValueError(f"frames must be task or own, got {frames!r}")
        # Each of its processes sees its own GPUs alone, so the first of them is meant, whatever the rank.
        rank = os.environ.pop("LOCAL_RANK", None)
        self.answerer = HarnessAnswerer.from_options(**options)
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
        self.takes_task_frames = frames == "task"
        self.nframe: int | None = 1 if self.takes_task_frames else None
        self.fps: float | None = 1.0 if self.takes_task_frames else None
        atexit.register(self.answerer.close)

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a question, parts of text and media in their order."""
        system = [part["value"] for part in message if part.get("role") == "system" and part["value"]]
        content = [_as_part(part) for part in message if part.get("role") != "system"]
        messages = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": "\n".join(system)})
        name = f"{dataset}/{hash_json([system, content])[:16]}"
        video = self.answerer.data.renderer.video
        if self.takes_task_frames and any(part["type"] == "video" for part in message):
            video = asked_frames(video, self.nframe, self.fps)
        (answer,) = self.answerer.answer([self.answerer.row(name, messages)], video=video)
        return self.answerer.text(answer)


def _as_part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of VLMEvalKit's message as one of a record."""
    kind = part["type"]
    return {"type": kind, "text" if kind == "text" else kind: part["value"]}

"""An environment and an engine for tiny runs with turns: clips of the row's video, whatever a tiny model says."""

from __future__ import annotations

from dataclasses import replace

from typing_extensions import override

from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits, FileFrames, read_video
from longrl.engines.hf import HFEngine
from longrl.engines.rollout_engine import RolloutEngine
from longrl.environments import Observation, ToolResponse
from longrl.turns import ToolCall
from longrl.types import FULL_SHARD

TOOL = {
    "type": "function",
    "function": {
        "name": "crop_video",
        "description": "Shows a part of the video.",
        "parameters": {"type": "object", "properties": {"start_s": {"type": "number"}}, "required": ["start_s"]},
    },
}


class Clips:
    """Answers two turns at most, by the length of what was said: with a clip of the video, an error, or the end."""

    tools = (TOOL,)

    def __init__(self, always: bool = False, num_starts: int = 3) -> None:
        self.always, self.num_starts, self.answered = always, num_starts, 0

    def reset(self, row):
        self.path = row.videos[0]

    def step(self, text):
        if self.answered == 2:
            return None
        self.answered += 1
        kind = 1 if self.always else sum(text.encode()) % 4
        start_s = float(sum(text.encode()) % self.num_starts)
        if kind == 0:
            return None
        if kind == 3:
            return Observation((ToolResponse(("error: no such time",), ToolCall("crop_video", error="no such time")),))
        frames = clip(self.path, start_s)
        call = ToolCall("crop_video", {"start_s": start_s}, None, 0.25, (start_s, start_s + 1.5), frames.timestamps)
        return Observation((ToolResponse(("Here: ", frames), call),))


def clip(path, start_s):
    """1.5 seconds of a video, with where they are from."""
    sampling = VideoSampling(fps=2.0, min_frames=2, span_s=(start_s, start_s + 1.5))
    source = FileFrames(path, sampling, FULL_SHARD, 2, DecodeLimits())
    return replace(read_video(path, sampling, temporal_patch_size=2), source=source)


class ShortTurns(HFEngine):
    """Ends turns with every second token, for a tiny model that was taught nothing has no use for end tokens."""

    @override
    def generate_turns(self, family, model, groups, *args):
        for trajectory in (one for group in groups for one in group):
            trajectory.stop_token_ids = tuple(range(0, len(family.tokenizer), 2))
        super().generate_turns(family, model, groups, *args)


class Elsewhere(ShortTurns):
    """The same with weights of its own, as a server has them: it generates while the trainer updates."""

    reads_policy_weights = False
    is_remote = True

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    @override
    def sync(self, family, model, step):
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.model = family.build() if self.model is None else self.model
        self.model.load_state_dict(state)

    @override
    def generate(self, family, model, *args, **options):
        return super().generate(family, self.model, *args, **options)

    @override
    def generate_turns(self, family, model, *args):
        super().generate_turns(family, self.model, *args)


def by_tokens(completion, row):
    """Differs within a group, by tokens alone."""
    return int(completion.token_ids.sum()) % 7 / 7


def first_two(groups):
    """Of three groups of each rollout two, so that steps of three groups leave some over."""
    return list(groups[:2])


class OneTurn(HFEngine):
    """An engine of the user's own that knows no environments."""

    @override
    def environment_problem(self):
        return RolloutEngine.environment_problem(self)

"""A tool environment of your own: the policy may ask for the colour of a video at a time, and is told.

    python examples/custom_environment.py

has it answer two turns, and then rolls out a completion whose turns are given. In a run (the base model has not learned
to call tools; `configs/demo/tools` is a stage of SFT that teaches it):

    python -m longrl synthetic --out runs/examples/videos --num_train_videos 64 --num_eval_videos 0 --fps 2
    python -m longrl fit --config configs/demo/common.yaml --config examples/short_run.yaml \
        --config examples/custom_environment.yaml --rollout.reward examples/custom_reward.yaml \
        --run_dir runs/examples/environment
"""

import longrl
from longrl.datamodules.media.sources import read_video
from longrl.datamodules.media.video_parts import frame_at
from longrl.environments.settings import EnvironmentSettings
from longrl.environments.tool_environment import ToolEnvironment, ToolError
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.testing.played_turns import play_turns
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos


class ColourAt(ToolEnvironment):
    """Answers with the mean colour of a frame, a few times for each completion.

    One instance serves one completion and is copied between processes at every turn: it holds plain values, and opens
    the video within the call.

    Args:
        max_looks: calls that are answered.
    """

    tool_names = ("colour_at",)

    def __init__(self, max_looks: int = 2) -> None:
        super().__init__()
        self.max_looks = max_looks

    def reset(self, row):
        """Begins with a row: nobody has looked yet."""
        self.path = row.videos[0]
        self.num_looks = 0

    def colour_at(self, time_s: float) -> str:
        """Says the mean colour of the video at a time.

        Args:
            time_s: Seconds from the start of the video.
        """
        if self.num_looks == self.max_looks:
            raise ToolError(f"colour_at may be called {self.max_looks} times; answer now")
        if time_s < 0:
            raise ToolError(f"time_s must be at least 0, got {time_s:g}; count from the start of the video")
        self.num_looks += 1
        red, green, blue = read_video(self.path, frame_at(time_s)).pixels.float().mean((0, 2, 3)).round().int().tolist()
        return f"red {red}, green {green}, blue {blue}"


CALL = '<tool_call>{"name": "colour_at", "arguments": {"time_s": %s}}</tool_call>'


def main(videos="runs/examples/videos", num_videos=64):
    # 1. By itself: the turns of a policy as text, and what it is told.
    generate_videos(videos, SyntheticConfig(num_videos, num_eval_videos=0, fps=2))
    row = longrl.read_rows(f"{videos}/train.jsonl", "longrl.datamodules.rows.longvideo_reason_row")[0]
    environment = ColourAt()
    environment.reset(row)
    for turn in (CALL % 4.5, CALL % -1, "It is green."):
        observation = environment.step(turn)
        answer = "the end" if observation is None else observation.responses[0].content[0]
        print(f"{turn}\n  -> {answer}")

    # 2. In a rollout: a process of its own answers, and the chat template writes what it says. Tokens that the policy
    # said are trained; those that it was shown are read alone.
    family = Qwen2_5_VLFamily("configs/demo/base", min_pixels=3136, max_pixels=3136)
    settings = EnvironmentSettings(f"{__file__}:ColourAt", {"max_looks": 1}, max_turns=3, num_workers=1)
    completion = play_turns(settings, family, row, [CALL % 4.5, CALL % 8.5, "It is green."])
    for turn in completion.turns:
        print(f"{turn.role} ({turn.num_tokens} tokens): {turn.text.strip()!r}")
    print(f"{completion.num_sampled} of {len(completion.token_ids)} tokens are the policy's")
    return completion


if __name__ == "__main__":  # environments run in processes, which import this file
    main()

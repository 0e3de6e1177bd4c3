"""`play_turns`: a completion whose turns are given, answered by an environment as in a rollout."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media.sampling import VideoSampling
from longrl.environments.runner import EnvironmentRunner
from longrl.environments.settings import EnvironmentSettings
from longrl.models.base import CausalFamily
from longrl.types import Completion, Row, SamplingParams

DEFAULT_SAMPLING = VideoSampling(fps=0.5)


def play_turns(
    settings: EnvironmentSettings,
    family: CausalFamily,
    row: Row,
    turns: Sequence[str],
    video: VideoSampling = DEFAULT_SAMPLING,
) -> Completion:
    """Plays a policy that says `turns`; the environment answers in a process of its own, as in a rollout.

    What it answers is rendered by the family's chat template, and frames that it shows go through the encoder. The
    process imports the script that calls this, which needs `if __name__ == "__main__":`.

    Args:
        settings: which environment, and its limits.
        family: of a small model; it is built.
        row: what the environment begins with.
        turns: of the policy, one after the other; those behind the end of the completion are left out.
        video: which frames the prompt has.

    Returns:
        The completion with its turns; `sampled` says which tokens the policy said, log-probabilities are 0.
    """
    runner = EnvironmentRunner(settings, family)
    try:
        family.tools = runner.tools
        prompt = RowRenderer(family, video)(row)
        said = [family.encode_response(turn) for turn in turns]
        limit = SamplingParams(num_generations=1, max_completion_tokens=sum(map(len, said)) + 1)
        ((trajectory,),) = runner.begin([prompt], limit)
        ask = runner.answers(family.build(), {})
        for text, ids in zip(turns, said, strict=True):
            if not trajectory.add_turn(ids, torch.zeros(len(ids)), text, stopped=True):
                break
            trajectory.add_observed(ask(trajectory).result())
            if trajectory.finish_reason is not None:
                break
        return trajectory.completion()
    finally:
        runner.close()

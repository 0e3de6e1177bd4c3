"""Two rewards of your own, a function and a class with settings, weighed beside one of longrl's.

    python examples/custom_reward.py

scores three answers. In a run, `rollout.reward` names them by file or import path (examples/custom_reward.yaml):

    python -m longrl synthetic --out runs/examples/videos --num_train_videos 64 --num_eval_videos 0 --fps 2
    python -m longrl fit --config configs/demo/common.yaml --config examples/short_run.yaml \
        --rollout.reward examples/custom_reward.yaml --run_dir runs/examples/reward
"""

from dataclasses import dataclass

import longrl
from longrl.rewards import think_answer_format
from longrl.rewards.options import parse_options


def right_option(completion, row):
    """1 if the right option's wording is said and no other's; less for each other one; None if there are no options."""
    options = parse_options(row.problem)
    if row.answer not in options:
        return None  # does not apply: the part is left out of this completion's sum
    said = [letter for letter, wording in options.items() if wording.lower() in completion.text.lower()]
    return 1 / len(said) if row.answer in said else 0.0


@dataclass(frozen=True)
class Brevity:
    """1 up to `max_words`, then less and less."""

    max_words: int = 20

    def __call__(self, completion, row):
        return min(1.0, self.max_words / max(1, len(completion.text.split())))


def main():
    # 1. The same weighted sum as in the YAML.
    reward = longrl.RewardSum(
        [
            longrl.RewardTerm(right_option, weight=0.8),
            longrl.RewardTerm(Brevity(max_words=4), weight=0.1),
            longrl.RewardTerm(think_answer_format, weight=0.1),
        ]
    )

    # 2. Rewards read texts: completions without tokens will do to try them.
    row = longrl.Row("1", "Where is the cross?\nA. top left\nB. top right\nC. bottom left\nD. bottom right", answer="B")
    texts = ["top right", "top left, then top right, where it stays", "<think>I saw it.</think><answer>A</answer>"]
    completions = [longrl.Completion((), (), text, "stop") for text in texts]
    prompt = longrl.Prompt(row.id, input_ids=(), position_ids=(), media=(), row=row)
    group = longrl.Group(prompt, completions)

    # 3. Scoring fills the group in. A function that raises makes its completion invalid: it is never a 0.
    num_failed = reward.score([group])
    for text, total, index in zip(texts, group.rewards.tolist(), range(len(texts)), strict=True):
        parts = ", ".join(f"{name} {values[index]:.2f}" for name, values in group.reward_parts.items())
        print(f"{total:.2f} = {parts}: {text!r}")
    assert num_failed == 0
    return group


if __name__ == "__main__":
    main()

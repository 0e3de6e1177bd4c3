"""An advantage and a surrogate of your own, in the places of GRPO's.

    python examples/custom_algorithm.py

prints what they give for a group of four completions. In a run (examples/custom_algorithm.yaml):

    python -m longrl synthetic --out runs/examples/videos --num_train_videos 64 --num_eval_videos 0 --fps 2
    python -m longrl fit --config configs/demo/common.yaml --config examples/short_run.yaml \
        --config examples/custom_algorithm.yaml --rollout.reward examples/custom_reward.yaml \
        --run_dir runs/examples/algorithm
"""

from dataclasses import dataclass

import torch

import longrl
from longrl.algorithms import TokenLosses, needs, single_rank


@needs(groups=True)  # checked before weights are loaded: one completion per prompt has no median to compare with
def median_centered(outcomes):
    """Reward minus the median of the group's valid completions, which one lucky completion does not move.

    `outcomes.rewards` and `.valid` are [P, G]. Returned is [P, G], or [N] with a value for each token.
    """
    rewards = outcomes.rewards.double().masked_fill(~outcomes.valid, torch.nan)
    return rewards - rewards.nanquantile(0.5, dim=1, keepdim=True)


@dataclass(frozen=True)
class RatioPenalty:
    """L = -rho A + beta / 2 (log rho)^2: a policy that moves away from the old one pays for it; nothing is clipped.

    `tokens` has the scored tokens of a micro-batch, all [R]; only `tokens.logp` carries a gradient.
    """

    beta: float = 1.0

    def __call__(self, tokens, clip_low, clip_high):
        log_ratio = (tokens.logp - tokens.old_logp).clamp(-20, 20)
        loss = -tokens.ratio * tokens.advantages + self.beta / 2 * log_ratio**2
        nowhere = torch.zeros_like(loss, dtype=torch.bool)  # where clipping changed the gradient, for the metrics
        return TokenLosses(loss, clipped_low=nowhere, clipped_high=nowhere)


def main():
    algorithm = longrl.Algorithm(advantage=median_centered, surrogate=RatioPenalty(beta=0.5))
    rewards = torch.tensor([[0.0, 0.0, 0.2, 1.0]])
    valid = torch.tensor([[True, True, True, True]])
    lengths = torch.tensor([2, 1, 1, 3])  # tokens of each completion

    advantages = algorithm.token_advantages(rewards, valid, lengths)  # [N]
    weights = algorithm.token_weights(lengths, valid.flatten(), single_rank)  # [C]
    completion_index = torch.arange(4).repeat_interleave(lengths)  # [N]
    old_logp = torch.full((7,), -1.0)
    logp = (old_logp + 0.1).requires_grad_()
    of_tokens = weights[completion_index]
    output = algorithm.loss(logp, old_logp, None, None, advantages, of_tokens, completion_index)
    output.loss.backward()

    print("advantages", [round(value, 2) for value in advantages.tolist()])
    print("loss", round(output.loss.item(), 4), "gradient", [round(value, 3) for value in logp.grad.tolist()])
    return advantages, output.loss


if __name__ == "__main__":
    main()

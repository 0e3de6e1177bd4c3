"""Baselines that make the variance of the gradient small.

Letters: P prompts, G completions of each, C = P * G, N tokens of all of them, completion after completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longrl.algorithms.advantages import Outcomes
from longrl.algorithms.needs import needs


@needs(groups=True)
def length_centered(outcomes: Outcomes) -> Tensor:
    """A = r - sum(|y| r) / sum(|y|) of the group: OPO, arXiv:2505.23585. [P, G].

    The baseline of least variance is the mean of rewards under the squared norm of each completion's gradient; OPO
    takes that as proportional to the length. Where all are as long it is `group_centered`; an empty completion gets 0.
    As in verl (`opo`).
    """
    returns = outcomes.returns
    lengths = outcomes.lengths.view_as(returns).double().where(outcomes.valid, 0.0)  # [P, G]
    mean = (lengths * returns).sum(1, keepdim=True) / lengths.sum(1, keepdim=True).clamp(min=1)  # [P, 1]
    return (returns - mean).where(lengths > 0, 0.0)


@needs(groups=True, rows="tokens", gradient_norms=True)
def optimal_token_baseline(outcomes: Outcomes, eps: float = 1e-8) -> Tensor:
    """A_t = G_t - B_t, B_t = sum(G_t W_t) / (sum(W_t) + eps) over the group's completions of t or more tokens. [N].

    The optimal token baseline, arXiv:2602.07078, as in verl: G_t is the reward still to come, W_t the sum over tokens
    up to t of |grad|^2 = 1 - 2 pi + sum over the vocabulary of pi^2, the squared norm of the gradient of log pi with
    respect to the logits, under the policy before the updates. A baseline for each token: what a completion has been
    uncertain about so far weighs what it says about others. Where one completion alone has a token t, A_t is 0 (verl's
    `handle_zero_tail` gives it G_t). verl can weigh W_t by the square of the correction; here it is not.

    Raises:
        ValueError: there are no norms, as of denoising steps.
    """
    if outcomes.gradient_norms is None:
        raise ValueError(
            "optimal_token_baseline needs the norms of the tokens' gradients, got none; set model.algorithm.advantage "
            "to longrl.algorithms.length_centered, which takes lengths in their place"
        )
    returns = outcomes.returns_to_go  # [N]
    valid = outcomes.per_token(outcomes.valid)
    energy = outcomes.sum_so_far(outcomes.gradient_norms)  # [N] W_t, 0 where not valid
    num_groups, num_generations = outcomes.rewards.shape
    lengths = outcomes.lengths
    widest = int(lengths.max()) if len(lengths) else 0
    # Tokens of one group and place share a slot.
    first = outcomes.per_token(lengths.cumsum(0) - lengths)  # [N]
    place = torch.arange(len(first), device=first.device) - first
    group = outcomes.per_token(torch.arange(len(lengths), device=first.device) // num_generations)
    slot = group * widest + place
    none = returns.new_zeros(num_groups * widest)
    weighted = none.index_add(0, slot, returns * energy)
    weights = none.index_add(0, slot, energy)
    baseline = weighted / (weights + eps)
    return (returns - baseline[slot]).where(valid, 0.0)

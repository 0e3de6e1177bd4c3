"""How much does a token count? The loss is the SUM of weight * loss of a token, never a mean.

A rule is `(lengths [C], valid [C], all_reduce) -> [C]`, the weight of EACH token of a completion, for the C completions
of one optimizer step on this rank. Over all tokens of all ranks the weights add up to 1 (for `Constant`: at most to 1),
so no split into micro-batches or ranks changes the gradient. Completions that are not valid or have no token weigh 0
and are counted nowhere; where there are no others, all weights are 0.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.algorithms.tokens import AllReduce, single_rank

logger = logging.getLogger(__name__)


def sequence_mean(lengths: Tensor, valid: Tensor, all_reduce: AllReduce = single_rank) -> Tensor:
    """1 / (number of completions * |y|): the mean over completions of the mean over tokens. GRPO, arXiv:2402.03300.

    A token of a short completion counts for more than one of a long completion.
    """
    counted = valid & (lengths > 0)
    num_completions = all_reduce(counted.double().sum())
    return _where(counted, 1 / (num_completions * lengths))


def token_mean(lengths: Tensor, valid: Tensor, all_reduce: AllReduce = single_rank) -> Tensor:
    """1 / number of tokens of the optimizer step over all ranks: every token counts the same. DAPO, arXiv:2503.14476.

    Eq. 8 of the paper divides by the tokens of one prompt's group; its code, verl and this function by those of the
    whole batch. It is also the sum over tokens of REINFORCE, RLOO and ReMax, divided by the mean length.
    """
    counted = valid & (lengths > 0)
    num_tokens = all_reduce(lengths.double().where(counted, 0.0).sum())
    return _where(counted, (1 / num_tokens).expand(lengths.shape))


@dataclass(frozen=True)
class Constant:
    """1 / (number of completions * max_completion_tokens): Dr.GRPO, arXiv:2503.20783, without length bias.

    Every token counts the same in every step, whatever the lengths; the weights add up to mean length / maximum.

    Example:
        `Constant(max_completion_tokens=1024)`; in YAML `class_path: longrl.algorithms.Constant` with `init_args`.
    """

    max_completion_tokens: int
    """The sampling limit of the run."""

    def __post_init__(self) -> None:
        if self.max_completion_tokens < 1:
            raise ValueError(f"max_completion_tokens must be at least 1, got {self.max_completion_tokens}")

    def validate(self, sampled: int) -> None:
        """Compares with the run's limit, before weights are loaded."""
        if self.max_completion_tokens < sampled:
            raise ValueError(
                f"Constant divides by {self.max_completion_tokens} tokens, but completions may have {sampled}; set "
                "model.algorithm.token_weights.init_args.max_completion_tokens to max_completion_tokens of the sampling"
            )
        if self.max_completion_tokens > sampled:
            logger.warning(
                "Constant divides by %d tokens, but completions have at most %d: the loss is %.1f times smaller than "
                "meant; set model.algorithm.token_weights.init_args.max_completion_tokens to %d",
                self.max_completion_tokens, sampled, self.max_completion_tokens / sampled, sampled,
            )  # fmt: skip

    def __call__(self, lengths: Tensor, valid: Tensor, all_reduce: AllReduce = single_rank) -> Tensor:
        """The weights [C]."""
        if lengths.numel() and int(lengths.max()) > self.max_completion_tokens:
            raise ValueError(
                f"a completion has {int(lengths.max())} tokens, above the {self.max_completion_tokens} that Constant "
                "divides by; set model.algorithm.token_weights.init_args.max_completion_tokens to "
                "max_completion_tokens of the sampling"
            )
        counted = valid & (lengths > 0)
        num_completions = all_reduce(counted.double().sum())
        return _where(counted, (1 / (num_completions * self.max_completion_tokens)).expand(lengths.shape))


def _where(counted: Tensor, weights: Tensor) -> Tensor:
    """[C] float32; what is not counted may have been divided by zero."""
    return torch.where(counted, weights, 0.0).float()

"""What a rollout engine is: it turns prompts into completions by the trainer's weights. And what seeds its samples.

Whatever the engine, equal seeds give equal completions: what seeds a prompt's samples is the seed of the rollout and an
id of the prompt, never its batch, its rank or its device.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longrl.engines.parity import RenderedPrompt
from longrl.models.base import CausalFamily
from longrl.strategies.axis import Axis
from longrl.types import Completion, Prompt, SamplingParams


class RolloutEngine(abc.ABC):
    """Generates completions with the trainer's weights.

    A step calls `sync`, `generate` for the prompts and for each round of resampling, then `sleep`.
    """

    reads_policy_weights: bool = False
    """Whether `generate` reads the trainer's model: sharded weights are then gathered around it."""
    is_remote: bool = False
    """Whether it computes in another process, so that it can generate while the trainer updates."""
    ranks_per_engine: int = 1
    """How many neighbouring ranks of a sequence-parallel group are one engine: they are given the same prompts and
    return the same completions."""

    @abc.abstractmethod
    def sync(self, family: CausalFamily, model: nn.Module, step: int) -> None:
        """Takes over the trainer's weights of `step`; nothing to do if the engine already holds them.

        Every rank of the run calls it at the same time.
        """

    @abc.abstractmethod
    def generate(
        self,
        family: CausalFamily,
        model: nn.Module,
        prompts: Sequence[Prompt],
        features: Mapping[str, Tensor],
        sampling: SamplingParams,
        seed: int,
        first: int = 0,
    ) -> list[list[Completion]]:
        """G completions of each prompt, from number `first` on: other ranks may have sampled those before.

        Equal seeds give equal completions of a prompt, whatever its batch and whoever samples which.
        """

    def identity(self) -> dict[str, Any]:
        """Options that decide an answer beside weights, prompt, sampling and seed, as plain values that JSON can hold.

        Stored answers are reused while they stay equal. Options that only say where, how fast, or how much at once the
        engine computes stay out. Training does not ask for it.

        Raises:
            ValueError: the engine does not say; an evaluation could not tell its answers from others.
        """
        raise ValueError(
            f"an evaluation must know which options of {type(self).__name__} decide its answers; define its "
            "`identity`, which returns them as a dict, {} if none do"
        )

    def library_versions(self) -> dict[str, str]:
        """Releases of the libraries that compute its answers, by name."""
        import transformers

        return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}

    def rendered_prompts(
        self, family: CausalFamily, prompts: Sequence[Prompt], features: Mapping[str, Tensor]
    ) -> list[RenderedPrompt]:
        """Each prompt as the engine reads it, to be compared with the trainer's; none if it reads the trainer's."""
        return []

    def max_length(self) -> int | None:
        """Tokens of the longest prompt and completion together, as far as is known before the engine starts."""
        return None

    # By default there is nothing to do.

    def invalidate_weights(self) -> None:  # noqa: B027
        """Has the next `sync` hand weights over whatever the step: the trainer's may have changed without one."""

    def sleep(self) -> None:  # noqa: B027
        """Lets memory go to the update: the rollouts of a step are done."""

    def close(self) -> None:  # noqa: B027
        """Ends the engine: the run is over."""


def prompt_seed(seed: int, prompt_id: str) -> int:
    """A 63-bit seed from the rollout's seed and the prompt's id, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest()[:8], "big") >> 1


def sampling_ids(ids: Sequence[str], data: Axis) -> list[str]:
    """Ids that seed this rank's samples: the prompts' own, and a new one for each copy of a prompt in a rollout.

    A batch in which an epoch ends can hold a prompt twice. Copies are counted in the order in which the ranks take
    turns to read prompts, so their ids are those that one rank with all prompts would give them.

    Args:
        ids: of this rank's prompts of the rollout.
        data: ranks with other prompts; all must call it.

    Example:
        `sampling_ids(["a", "b", "a"], SINGLE_RANK)` is `["a", "b", "a (copy 1)"]`.
    """
    ids_of_ranks = data.gather(list(ids))
    num_seen: Counter[str] = Counter()
    local_ids = []
    for turn in itertools.zip_longest(*ids_of_ranks):
        for rank, prompt_id in enumerate(turn):
            if prompt_id is None:  # this rank has fewer prompts
                continue
            if rank == data.rank:
                copy = num_seen[prompt_id]
                local_ids.append(f"{prompt_id} (copy {copy})" if copy else prompt_id)
            num_seen[prompt_id] += 1
    return local_ids

"""`Trajectory`: a completion in the making, turn after turn, whatever engine samples it.

A turn may be cut, as where the engine gets other weights: its parts go on behind each other (`add_part`), and the last
one ends it (`add_turn`).

Letters: S tokens so far, n of them sampled, A position axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longrl.datamodules.media.saved_media import restored_media, saved_media
from longrl.turns import Turn, restored_turn, saved_turn
from longrl.types import Completion, FinishReason, Media, Observed, Prompt, SamplingParams, UnusableSample


class Trajectory:
    """One completion of a prompt. An engine samples a turn, adds it, and adds what it is answered with.

    Args:
        prompt: under the id that seeds its samples.
        number: of the completion among those of its prompt, over all ranks; with the prompt's id it decides the draws.
        sampling: its `max_completion_tokens` are those that may be sampled over all turns.
        max_turns: after so many turns it ends.
    """

    def __init__(self, prompt: Prompt, number: int, sampling: SamplingParams, max_turns: int) -> None:
        self.prompt = prompt
        self.number = number
        self.sampling = sampling
        self.max_turns = max_turns
        self.stop_token_ids: tuple[int, ...] = ()
        """Tokens that end a turn beside the end tokens of the family."""
        self.max_observed_tokens = 0
        """Of all that it is shown; an engine plans its memory by it."""
        self.experts: Tensor | None = None
        """Of the completion, once it has ended; those of `Completion`."""
        self.prompt_experts: Tensor | None = None
        self.environment_state: bytes | None = None
        """Its environment between two turns, as `EnvironmentRunner` keeps it; None before the first answer."""
        self.turns: list[Turn] = []
        self.num_sampled = 0
        """n"""
        self.num_observed = 0
        self.finish_reason: FinishReason | None = None
        """None while it goes on."""
        self.media: tuple[Media, ...] = ()
        """All that it was shown."""
        self.num_cuts = 0
        """Parts of turns that were cut; with the turns it decides what the next tokens are drawn by."""
        self._turn: list[Tensor] = []
        """Ids of the policy's last turn, part after part; emptied by the part that begins the next one."""
        self._turn_goes_on = False
        """The last turn was cut."""
        self._ids: list[Tensor] = []
        self._sampled: list[Tensor] = []
        self._logprobs: list[Tensor] = []
        self._versions: list[Tensor] = []
        self._positions: list[Tensor] = []
        self._next_position = torch.zeros((), dtype=prompt.position_ids.dtype)
        """Where the next token stands, counted from the prompt's end."""

    @property
    def tokens_left(self) -> int:
        """Tokens that may still be sampled."""
        return self.sampling.max_completion_tokens - self.num_sampled

    @property
    def num_policy_turns(self) -> int:
        """Turns that the policy has taken."""
        return sum(turn.role == "assistant" for turn in self.turns)

    @property
    def turn_ids(self) -> Tensor:
        """[s] token ids of the policy's last turn, as far as it has come."""
        return torch.cat([torch.zeros(0, dtype=torch.int64), *self._turn])

    @property
    def num_open_tokens(self) -> int:
        """Tokens of a turn that was cut and is to go on, 0 if none was."""
        return len(self.turn_ids) if self._turn_goes_on else 0

    @property
    def oldest_version(self) -> int | None:
        """The optimizer step whose weights drew its first token, None before one or where nobody says."""
        return next((int(part.min()) for part in self._versions if len(part)), None)

    @property
    def text(self) -> str:
        """Of the last turn of the policy."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "assistant"), "")

    def add_part(self, token_ids: Tensor, logprobs: Tensor, version: int | None = None) -> None:
        """Takes the first tokens of a turn that was cut, or further ones; arguments are those of `add_turn`."""
        self._add_sampled(token_ids, logprobs, version)
        self._turn_goes_on = True
        self.num_cuts += 1

    def add_turn(
        self, token_ids: Tensor, logprobs: Tensor, text: str, stopped: bool, version: int | None = None
    ) -> bool:
        """Takes what was sampled in a turn, of one that was cut what its last part has.

        Args:
            token_ids: [s] with the token that ended it, if one did.
            logprobs: [s] of the distribution each was drawn from.
            text: of the whole turn, as rewards read it.
            stopped: an end token ended it; False where it ran out of tokens.
            version: optimizer step of the weights that drew it; None where all of a rollout are of the same.

        Returns:
            True if the environment is to be asked.
        """
        self._add_sampled(token_ids, logprobs, version)
        self._turn_goes_on = False
        self.turns.append(Turn("assistant", text, len(self.turn_ids)))
        if not stopped:
            self.finish_reason = "length"
        elif self.num_policy_turns == self.max_turns or not self.tokens_left:
            self.finish_reason = "stop"
        return self.finish_reason is None

    def add_observed(self, observed: Observed | None) -> None:
        """Takes what the environment answered; None ends the completion."""
        if observed is None:
            self.finish_reason = "stop"
            return
        count = len(observed.input_ids)
        self._add(observed.input_ids, torch.zeros(count, dtype=torch.bool), observed.position_ids)
        self.num_observed += count
        self.media += observed.media
        self.turns.append(Turn("tool", observed.text, count, observed.calls))

    def _add_sampled(self, ids: Tensor, logprobs: Tensor, version: int | None) -> None:
        """Tokens of the turn that goes on, or of the next one."""
        if not self._turn_goes_on:
            self._turn.clear()
        self._turn.append(ids)
        self._add(ids, torch.ones(len(ids), dtype=torch.bool), None)
        self._logprobs.append(logprobs)
        if version is not None:
            self._versions.append(torch.full((len(ids),), version))
        self.num_sampled += len(ids)

    def _add(self, ids: Tensor, sampled: Tensor, positions: Tensor | None) -> None:
        """Tokens and their positions counted from 0; None is one after the other."""
        if not len(ids):
            return
        if positions is None:
            positions = torch.arange(len(ids)).expand(len(self.prompt.position_ids), -1)
        placed = self._next_position + positions  # [A, T]
        self._ids.append(ids)
        self._sampled.append(sampled)
        self._positions.append(placed)
        self._next_position = placed.max() + 1

    # -- what engines read ---------------------------------------------------------------------------------------

    def so_far(self) -> Prompt:
        """Prompt and all tokens so far as one prompt, for an engine that is asked for one turn after the other."""
        start = self.prompt.position_ids.max() + 1
        positions = [self.prompt.position_ids, *(start + part for part in self._positions)]
        return replace(
            self.prompt,
            input_ids=torch.cat([self.prompt.input_ids, *self._ids]),
            position_ids=torch.cat(positions, 1),
            media=(*self.prompt.media, *self.media),
        )

    @property
    def next_position(self) -> Tensor:
        """[] where the next token stands on every axis."""
        return self.prompt.position_ids.max() + 1 + self._next_position

    @property
    def sampled_mask(self) -> Tensor:
        """[S] bool, True where a token was sampled, False where it was shown."""
        return torch.cat([torch.zeros(0, dtype=torch.bool), *self._sampled])

    def completion(self) -> Completion:
        """The whole, once it has ended."""
        assert self.finish_reason is not None, "it has not ended"
        ids = torch.cat(self._ids)
        was_shown = self.num_observed > 0
        return Completion(
            token_ids=ids,
            logprobs=torch.cat(self._logprobs),
            text=self.text,
            finish_reason=self.finish_reason,
            sampled=torch.cat(self._sampled) if was_shown else None,
            position_ids=torch.cat(self._positions, 1) if was_shown else None,
            # Pixels were for the encoder alone; where they came from stays known. A view would keep and send them all.
            media=tuple(replace(item, patches=item.patches[:0].clone(), is_whole=True) for item in self.media),
            turns=tuple(self.turns),
            experts=self.experts,
            prompt_experts=self.prompt_experts,
            versions=torch.cat(self._versions) if self._versions else None,
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """All but prompt and limits as tensors and plain values, also of one that has not ended; no pixels."""
        saved = {name: getattr(self, name) for name in SAVED_FIELDS}
        saved["tensors"] = {name: _joined(getattr(self, name)) for name in SAVED_TENSORS}
        saved["turns"] = [saved_turn(turn) for turn in self.turns]
        saved["media"] = [saved_media(item) for item in self.media]
        return saved

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on where `saved` was made; the media that it was shown have no features yet.

        Raises:
            UnusableSample: it was shown what no file has.
        """
        media = tuple(restored_media(item) for item in saved["media"])
        if any(item.source is None for item in media):
            raise UnusableSample(None, "an environment showed it what no file has; give its frames a source")
        for name in SAVED_FIELDS:
            setattr(self, name, saved[name])
        for name in SAVED_TENSORS:
            whole = saved["tensors"][name]
            setattr(self, name, [] if whole is None else [whole])
        self.turns = [restored_turn(turn) for turn in saved["turns"]]
        self.media = media


SAVED_FIELDS = (
    "environment_state", "num_sampled", "num_observed", "finish_reason", "num_cuts", "_turn_goes_on", "_next_position",
)  # fmt: skip
SAVED_TENSORS = ("_turn", "_ids", "_sampled", "_logprobs", "_versions", "_positions")


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Parts end to end along their last dimension; a clone, for a view would save what it is a part of."""
    return torch.cat(list(parts), -1).clone() if parts else None


Answer = Callable[[Trajectory], "Future[Observed | None]"]
"""Asks the environment of a trajectory about its last turn. The result has its media's features where the engine looks
for those of prompts."""


def begin(
    prompts: Sequence[Prompt], sampling: SamplingParams, max_turns: int, first: int = 0
) -> list[list[Trajectory]]:
    """The G trajectories of each prompt, numbered from `first` on."""
    numbers = range(first, first + sampling.num_generations)
    return [[Trajectory(prompt, number, sampling, max_turns) for number in numbers] for prompt in prompts]

"""Completions of several turns by the trainer's own model: those that wait for an answer and those that go on.

Letters: P prompts, G completions each, B = P * G, A position axes, T tokens that are shown, D hidden size, S the most
tokens that a completion samples.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longrl.engines.sampling import LMHead, sample_tokens
from longrl.engines.turn_cache import Piece, TurnCache
from longrl.environments.trajectory import Answer, Trajectory
from longrl.io.pulse import PULSE
from longrl.models.base import CausalFamily
from longrl.types import Observed, Packed, SamplingParams, to_device

STEPS_TOGETHER = 8
"""Answers are taken in at steps that are multiples of it, or those of many completions would be as many forward
passes."""


@dataclass(frozen=True)
class Waiting:
    """A completion whose turn has ended and will be answered."""

    completion: int
    last_token: int
    """Ended the turn, and no step has read it."""
    due: int
    """The step before which the answer is taken in."""
    answer: Future[Observed | None]


@dataclass(frozen=True)
class Shown:
    """What a completion reads before it goes on."""

    completion: int
    input_ids: Tensor
    """[T + 1] the token that ended its turn, and what it is shown."""
    position_ids: Tensor
    """[A, T + 1]."""
    observed: Observed


class TurnSampler:
    """Samples trajectories whose prompts are in a cache, to their ends.

    Steps are the time: a turn that ends at a step is answered a number of steps later, however long the tools take, and
    at once if nobody samples meanwhile. If the answer is not there then, all wait. So equal seeds give equal
    completions to the bit.

    Args:
        family: of the model.
        model: made by `build`.
        trajectories: the B, those of a prompt side by side.
        features: {media key: [N, D]}, to which `answer` adds.
        sampling: of every turn.
        uniforms: [B, S] numbers in [0, 1); the k-th draws the k-th token that a trajectory samples.
        answer: asks the environment.
        cache: holds the prompts.
        hidden: [B, D] states of the prompts' last tokens.
        chunk_tokens: shown tokens that go through the model together.
        answer_after_tokens: steps between a turn and its answer, up to the next multiple of `STEPS_TOGETHER`.
    """

    def __init__(
        self,
        family: CausalFamily,
        model: Any,
        trajectories: Sequence[Trajectory],
        features: Mapping[str, Tensor],
        sampling: SamplingParams,
        uniforms: Tensor,
        answer: Answer,
        *,
        cache: TurnCache,
        hidden: Tensor,
        chunk_tokens: int,
        answer_after_tokens: int,
    ) -> None:
        self.family = family
        self.model = model
        self.trajectories = trajectories
        self.features = features
        self.sampling = sampling
        self.answer = answer
        self.cache = cache
        self.chunk_tokens = chunk_tokens
        self.answer_after_tokens = answer_after_tokens
        self.step = 0
        self._lm_head = LMHead(family, model)
        self._device = hidden.device
        self._hidden = hidden
        self._uniforms = uniforms.to(hidden.device)
        self._tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        """[B] drawn last."""
        self._num_drawn = torch.zeros_like(self._tokens)
        """[B] over all turns."""
        self._positions = to_device(torch.stack([one.next_position for one in trajectories])[:, None], hidden.device)
        """[B, 1] of the next token, the same on all axes."""
        self._ids: list[list[int]] = [[] for _ in trajectories]
        """Of the turn that goes on."""
        self._logprobs: list[list[float]] = [[] for _ in trajectories]
        self._sampling = list(range(len(trajectories)))
        """Completions that sample."""
        self._is_sampling = torch.ones_like(self._tokens, dtype=torch.bool)
        """[B] the same as a mask."""
        self._waiting: list[Waiting] = []

    def run(self) -> None:
        """Samples all to their ends."""
        while self._sampling or self._waiting:
            PULSE.beats += 1
            self._take_answers()
            if self._sampling:
                self._draw()
            if self._sampling:
                self._decode()
            self.step += 1

    # -- sampling --------------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        """Draws a token of every completion, and ends turns."""
        number = self._num_drawn.clamp_max(self._uniforms.shape[1] - 1)
        uniform = self._uniforms.gather(1, number[:, None])[:, 0]
        self._tokens, logprobs = sample_tokens(self._lm_head(self._hidden), self.sampling, uniform)
        # The one wait for the GPU of a step; both fit into float64 as they are.
        tokens_and_logprobs = torch.stack([self._tokens.double(), logprobs.double()]).tolist()
        ended = []
        for index in self._sampling:
            token = int(tokens_and_logprobs[0][index])
            trajectory = self.trajectories[index]
            ids = self._ids[index]
            ids.append(token)
            self._logprobs[index].append(tokens_and_logprobs[1][index])
            stopped = token in self.family.end_token_ids or token in trajectory.stop_token_ids
            if stopped or len(ids) == trajectory.tokens_left:
                ended.append(index)
                self._end_turn(index, stopped)
        if ended:
            self._set_sampling([index for index in self._sampling if index not in ended])

    def _end_turn(self, index: int, stopped: bool) -> None:
        trajectory = self.trajectories[index]
        last_token = self._ids[index][-1]
        ids = torch.tensor(self._ids[index])
        logprobs = torch.tensor(self._logprobs[index], dtype=torch.float32)
        self._ids[index] = []
        self._logprobs[index] = []
        if trajectory.add_turn(ids, logprobs, self.family.decode(ids), stopped):
            self.cache.hold(index)
            due = self.step + 1 + self.answer_after_tokens
            due += -due % STEPS_TOGETHER
            self._waiting.append(Waiting(index, last_token, due, self.answer(trajectory)))

    def _decode(self) -> None:
        """Feeds the drawn tokens back."""
        self.cache.begin_step(self._sampling)
        num_axes = len(self.trajectories[0].prompt.position_ids)
        self._hidden = self.family.hidden_states(
            self.model,
            self._positions.expand(num_axes, -1, -1),  # [A, B, 1]
            inputs_embeds=self.model.get_input_embeddings()(self._tokens)[:, None],  # [B, 1, D]
            layer_attention=self.cache.decode,
            layer_recurrence=self.cache.decode_recurrence,
        )[:, 0]
        self.cache.end_step(self._sampling, self._is_sampling)
        self._num_drawn += self._is_sampling
        self._positions += self._is_sampling[:, None]

    def _set_sampling(self, indices: list[int]) -> None:
        self._sampling = sorted(indices)
        mask = torch.zeros(len(self.trajectories), dtype=torch.bool)
        mask[self._sampling] = True
        self._is_sampling = to_device(mask, self._device)

    # -- answers ---------------------------------------------------------------------------------------------------

    def _take_answers(self) -> None:
        """Takes in the answers that are due; if nobody samples, time goes on to where some are."""
        while self._waiting:
            due = min(each.due for each in self._waiting)
            if self._sampling and due > self.step:
                return
            self.step = max(self.step, due)
            now = sorted((each for each in self._waiting if each.due <= self.step), key=lambda each: each.completion)
            self._waiting = [each for each in self._waiting if each.due > self.step]
            shown = []
            for each in now:
                observed = each.answer.result()
                trajectory = self.trajectories[each.completion]
                if observed is not None:
                    shown.append(_shown(each, trajectory, observed))
                trajectory.add_observed(observed)
            if shown:
                self._show(shown)
                self._set_sampling([*self._sampling, *(each.completion for each in shown)])

    def _show(self, shown: Sequence[Shown]) -> None:
        """Has completions read what they are shown, in chunks that end anywhere; their next token is drawn from it."""
        packed = _packed(shown).to(self._device)
        for each in shown:
            trajectory = self.trajectories[each.completion]
            self.cache.reserve(each.completion, len(each.input_ids) + trajectory.tokens_left)
        stops = []
        total = 0
        for each in shown:
            total += len(each.input_ids)
            stops.append(total)
        last_states = []
        for start in range(0, total, self.chunk_tokens):
            rows = slice(start, min(start + self.chunk_tokens, total))
            pieces = _pieces(shown, rows)
            inputs = self.family.text_inputs(self.model, packed, self.features, rows)
            inputs["layer_attention"] = functools.partial(self.cache.append, pieces)
            inputs["layer_recurrence"] = functools.partial(self.cache.append_recurrence, pieces)
            positions = packed.position_ids[:, None, rows]  # [A, 1, rows]
            hidden = self.family.hidden_states(self.model, positions, **inputs)[0]  # [rows, D]
            self.cache.end_append(pieces)
            last_states += [hidden[stop - 1 - start] for stop in stops if start < stop <= rows.stop]
            PULSE.beats += 1
        indices = [each.completion for each in shown]
        for index in indices:
            self.cache.resume(index)
        where = to_device(torch.tensor(indices), self._device)
        self._hidden[where] = torch.stack(last_states)
        following = torch.stack([self.trajectories[index].next_position for index in indices])
        self._positions[where, 0] = to_device(following, self._device)


def _shown(waiting: Waiting, trajectory: Trajectory, observed: Observed) -> Shown:
    """What a completion reads whose trajectory has not taken the answer in yet."""
    following = trajectory.next_position
    observed_positions = following + observed.position_ids
    last_position = (following - 1).expand(len(observed_positions), 1)
    return Shown(
        waiting.completion,
        torch.cat([torch.tensor([waiting.last_token]), observed.input_ids]),
        torch.cat([last_position, observed_positions], 1),
        observed,
    )


def _packed(shown: Sequence[Shown]) -> Packed:
    """What several completions are shown, end to end."""
    none = torch.empty(0, dtype=torch.int64)
    placeholders = [torch.ones(len(each.input_ids), dtype=torch.bool) for each in shown]
    for each in placeholders:
        each[0] = False  # the policy's own
    media = [item for each in shown for item in each.observed.media]
    return Packed(
        input_ids=torch.cat([each.input_ids for each in shown]),
        position_ids=torch.cat([each.position_ids for each in shown], 1),
        spans=(),
        predict_from=none,
        target_ids=none,
        completion_index=none,
        token_index=none,
        media_keys=tuple(item.key for item in media),
        media_kinds=tuple(item.kind for item in media),
        shown=torch.cat(placeholders),
    )


def _pieces(shown: Sequence[Shown], rows: slice) -> tuple[Piece, ...]:
    """The completions of these rows."""
    pieces = []
    start = 0
    for each in shown:
        stop = start + len(each.input_ids)
        count = min(stop, rows.stop) - max(start, rows.start)
        if count > 0:
            pieces.append(Piece(each.completion, count))
        start = stop
    return tuple(pieces)

"""Completions of several turns by the trainer's own model: those that wait for an answer and those that go on.

Letters: P prompts, G completions each, B = P * G, A position axes, T tokens that are shown, D hidden size, S the most
tokens that a completion samples.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longrl.engines.expert_record import TurnExperts
from longrl.engines.sampling import LMHead, sample_tokens
from longrl.engines.turn_cache import Piece, TurnCache
from longrl.environments.trajectory import Answer, Trajectory
from longrl.io.pulse import PULSE
from longrl.models.base import CausalFamily
from longrl.types import Observed, Packed, SamplingParams, to_device

STEPS_TOGETHER = 8
"""Answers are taken in at steps that are multiples of it: else those of many completions would be as many passes."""
FULL_SHARE = 0.5
"""Rows of completions that have ended are dropped once no more than this share of all is needed."""


@dataclass
class Slot:
    """A row of every decoding step: a completion that samples, waits for an answer, or has ended."""

    trajectory: Trajectory
    is_sampling: bool = True
    ids: list[int] = field(default_factory=list)
    """Of the turn that goes on, or ended last."""
    logprobs: list[float] = field(default_factory=list)
    answer: Future[Observed | None] | None = None
    """What it waits for."""
    due: int = 0
    """The step before which the answer is taken in."""


@dataclass(frozen=True)
class Shown:
    """What a completion reads before it goes on."""

    row: int
    """Its slot's."""
    input_ids: Tensor
    """[T + 1] the token that ended its turn, which no step has read, and what it is shown."""
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
        experts: has seen the prompts.
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
        experts: TurnExperts,
        chunk_tokens: int,
        answer_after_tokens: int,
    ) -> None:
        self.family = family
        self.model = model
        self.features = features
        self.sampling = sampling
        self.answer = answer
        self.cache = cache
        self.experts = experts
        self.chunk_tokens = chunk_tokens
        self.answer_after_tokens = answer_after_tokens
        self.step = 0
        self.slots = [Slot(trajectory) for trajectory in trajectories]
        self._lm_head = LMHead(family, model)
        self._device = hidden.device
        self._hidden = hidden
        self._uniforms = uniforms.to(hidden.device)
        self._tokens = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        """[B] drawn last."""
        self._num_drawn = torch.zeros_like(self._tokens)
        """[B] over all turns."""
        self._positions = to_device(torch.stack([one.next_position for one in trajectories]), hidden.device)
        """[B] of the next token, the same on all axes."""
        self._note_who_samples()

    def run(self) -> None:
        """Samples all to their ends."""
        while True:
            PULSE.beats += 1
            self._take_answers()
            if not self._sampling:
                return
            if self._draw():
                self._drop_ended()
                self._note_who_samples()
            if self._sampling:
                self._decode()
            self.step += 1

    def _note_who_samples(self) -> None:
        self._sampling = [row for row, slot in enumerate(self.slots) if slot.is_sampling]
        """Rows that sample, and the same as a [B] mask."""
        mask = torch.tensor([slot.is_sampling for slot in self.slots])
        self._is_sampling = to_device(mask, self._device)

    # -- sampling --------------------------------------------------------------------------------------------------

    def _draw(self) -> bool:
        """Draws a token in every slot; True if that ended turns."""
        number = self._num_drawn.clamp_max(self._uniforms.shape[1] - 1)
        uniform = self._uniforms.gather(1, number[:, None])[:, 0]
        self._tokens, logprobs = sample_tokens(self._lm_head(self._hidden), self.sampling, uniform)
        # The one wait for the GPU of a step; both fit into float64 as they are.
        tokens, logps = torch.stack([self._tokens.double(), logprobs.double()]).tolist()
        has_ended = False
        for row in self._sampling:
            slot = self.slots[row]
            token = int(tokens[row])
            slot.ids.append(token)
            slot.logprobs.append(logps[row])
            stopped = token in self.family.end_token_ids or token in slot.trajectory.stop_token_ids
            if stopped or len(slot.ids) == slot.trajectory.tokens_left:
                has_ended = True
                self._end_turn(row, stopped)
        return has_ended

    def _end_turn(self, row: int, stopped: bool) -> None:
        slot = self.slots[row]
        slot.is_sampling = False
        ids = torch.tensor(slot.ids)
        logprobs = torch.tensor(slot.logprobs, dtype=torch.float32)
        if slot.trajectory.add_turn(ids, logprobs, self.family.decode(ids), stopped):
            self.cache.hold(row)
            slot.due = self.step + 1 + self.answer_after_tokens
            slot.due += -slot.due % STEPS_TOGETHER
            slot.answer = self.answer(slot.trajectory)

    def _decode(self) -> None:
        """Feeds the drawn tokens back."""
        self.cache.begin_step(self._sampling)
        num_axes = len(self.slots[0].trajectory.prompt.position_ids)
        self._hidden = self.family.hidden_states(
            self.model,
            self._positions[:, None].expand(num_axes, -1, -1),  # [A, B, 1]
            inputs_embeds=self.model.get_input_embeddings()(self._tokens)[:, None],  # [B, 1, D]
            layer_attention=self.cache.decode,
            layer_recurrence=self.cache.decode_recurrence,
            **self.experts.of_tokens(len(self.slots)),
        )[:, 0]
        for row in self._sampling:
            self.experts.assign(self.slots[row].trajectory, row, row + 1)
        self.cache.end_step(self._sampling, self._is_sampling)
        self._num_drawn += self._is_sampling
        self._positions += self._is_sampling

    def _drop_ended(self) -> None:
        """Drops rows of completions that have ended, if that leaves few: as many of each prompt that has others."""
        group_size = self.cache.num_generations
        going_on = [row for row, slot in enumerate(self.slots) if slot.trajectory.finish_reason is None]
        of_prompts = {number: list(rows) for number, rows in itertools.groupby(going_on, lambda row: row // group_size)}
        width = max(map(len, of_prompts.values()), default=0)
        if not 0 < len(of_prompts) * width <= FULL_SHARE * len(self.slots):
            return
        kept: list[int] = []
        for number, rows in of_prompts.items():
            ended = set(range(number * group_size, (number + 1) * group_size)) - set(rows)
            kept += sorted([*rows, *sorted(ended)[: width - len(rows)]])
        self.cache.keep(list(of_prompts), kept)
        self.slots = [self.slots[row] for row in kept]
        index = to_device(torch.tensor(kept), self._device)
        self._hidden, self._uniforms = self._hidden[index], self._uniforms[index]
        self._tokens, self._num_drawn = self._tokens[index], self._num_drawn[index]
        self._positions = self._positions[index]

    # -- answers ---------------------------------------------------------------------------------------------------

    def _take_answers(self) -> None:
        """Takes in the answers that are due; if nobody samples, time goes on to where some are."""
        while waiting := [row for row, slot in enumerate(self.slots) if slot.answer is not None]:
            due = min(self.slots[row].due for row in waiting)
            if self._sampling and due > self.step:
                return
            self.step = max(self.step, due)
            shown = []
            for row in waiting:
                slot = self.slots[row]
                if slot.due > self.step:
                    continue
                assert slot.answer is not None
                observed = slot.answer.result()
                slot.answer = None
                if observed is not None:
                    shown.append(_shown(row, slot, observed))
                    slot.is_sampling = True
                    slot.ids, slot.logprobs = [], []
                slot.trajectory.add_observed(observed)
            if shown:
                self._show(shown)
            self._note_who_samples()

    def _show(self, shown: Sequence[Shown]) -> None:
        """Has completions read what they are shown, in chunks that end anywhere; their next token is drawn from it."""
        packed = _packed(shown).to(self._device)
        for each in shown:
            tokens_left = self.slots[each.row].trajectory.tokens_left
            self.cache.reserve(each.row, len(each.input_ids) + tokens_left)
        stops = list(itertools.accumulate(len(each.input_ids) for each in shown))
        last_states = []
        for start in range(0, stops[-1], self.chunk_tokens):
            rows = slice(start, min(start + self.chunk_tokens, stops[-1]))
            pieces = _pieces(shown, rows)
            inputs = self.family.text_inputs(self.model, packed, self.features, rows)
            inputs |= self.experts.of_tokens(rows.stop - rows.start)
            inputs["layer_attention"] = functools.partial(self.cache.append, pieces)
            inputs["layer_recurrence"] = functools.partial(self.cache.append_recurrence, pieces)
            positions = packed.position_ids[:, None, rows]  # [A, 1, rows]
            hidden = self.family.hidden_states(self.model, positions, **inputs)[0]  # [rows, D]
            for piece in pieces:
                self.experts.assign(self.slots[piece.row].trajectory, piece.start, piece.stop)
            self.cache.end_append(pieces)
            last_states += [hidden[stop - 1 - start] for stop in stops if start < stop <= rows.stop]
            PULSE.beats += 1
        # They sample from here.
        for each in shown:
            self.cache.resume(each.row)
        following = torch.stack([self.slots[each.row].trajectory.next_position for each in shown])
        index = to_device(torch.tensor([each.row for each in shown]), self._device)
        self._hidden[index] = torch.stack(last_states)
        self._positions[index] = to_device(following, self._device)


def _shown(row: int, slot: Slot, observed: Observed) -> Shown:
    """What a completion reads whose trajectory has not taken the answer in yet."""
    following = slot.trajectory.next_position
    observed_positions = following + observed.position_ids
    last_position = (following - 1).expand(len(observed_positions), 1)
    return Shown(
        row,
        torch.cat([torch.tensor(slot.ids[-1:]), observed.input_ids]),
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
    """The completions that have these rows, and which of them, counted from the first."""
    pieces = []
    begin = 0
    for each in shown:
        end = begin + len(each.input_ids)
        start = max(begin, rows.start)
        stop = min(end, rows.stop)
        if start < stop:
            pieces.append(Piece(each.row, start - rows.start, stop - rows.start))
        begin = end
    return tuple(pieces)

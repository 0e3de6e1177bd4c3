"""What a teacher says of scored rows, as a chunk of the LM head reads it.

That is either the tokens that it finds likeliest, or its own hidden states and head.

Letters: N rows that teachers have scored, R scored rows of a micro-batch, r those of a chunk; V rows of a head, v those
that both heads have, D the teacher's hidden size, k tokens that it finds likeliest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DivergenceOfRows = Callable[[Tensor, Tensor], Tensor]
"""(policy's log-probabilities [r, v], teacher's [r, v]) -> [r]."""
LEAST_REST = 1e-6
"""Probability of all tokens beside the likeliest: a sum of float32 that is 1 less than that leaves nothing to say."""


@dataclass(frozen=True)
class TeacherScores:
    """What a teacher says of N sampled tokens, without gradient, on the run's device.

    Its distributions, where the divergence needs them, are the `top_k` likeliest tokens, or hidden states and LM head.
    All ranks of a sequence-parallel group have the same.
    """

    logp: Tensor
    """[N] float32 log-probability of each sampled token, at the teacher's temperature."""
    top_ids: Tensor | None = None
    """[N, k] int64 ids of the likeliest tokens, all different, in any order."""
    top_logp: Tensor | None = None
    """[N, k] float32 log-probabilities of those, at the teacher's temperature, of the whole vocabulary."""
    hidden: Tensor | None = None
    """[N, D] last hidden states that predict the tokens."""
    lm_head: Tensor | None = None
    """[V, D]; fewer rows than the policy's head, or more, are padding."""
    num_passes: float = 0.0
    """Prompts that were read for it: P, if each was read once with all that follows it."""


@dataclass(frozen=True)
class TeacherSpan:
    """Neighbouring rows that one teacher has scored."""

    start: int
    """Of the R rows."""
    index: Tensor
    """[rows] of each its place among the N of `scores`."""
    scores: TeacherScores

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + len(self.index)

    def part(self, start: int, stop: int) -> TeacherSpan:
        """Rows start..stop of the R rows, which are this span's."""
        return replace(self, start=start, index=self.index[start - self.start : stop - self.start])


@dataclass(frozen=True)
class TeacherTargets:
    """The distributions that the rows of a micro-batch are to have, and how the distance to them is measured."""

    spans: tuple[TeacherSpan, ...]
    """In the order of their rows; rows of none have no teacher."""
    divergence: DivergenceOfRows
    temperature: float
    """The teachers'."""

    def share(self, rows: slice) -> TeacherTargets:
        """Those of some of the rows, which then count from 0."""
        spans = []
        for span in self.spans:
            start = max(span.start, rows.start)
            stop = min(span.stop, rows.stop)
            if start < stop:
                part = span.part(start, stop)
                spans.append(replace(part, start=start - rows.start))
        return replace(self, spans=tuple(spans))


def row_chunks(
    spans: Sequence[TeacherSpan], num_rows: int, vocabulary: int, max_logits: int
) -> list[tuple[slice, TeacherSpan | None]]:
    """Slices of the rows, each of one teacher or of none, of which policy and teacher have `max_logits` logits.

    Args:
        spans: rows that have a teacher, in their order.
        num_rows: R.
        vocabulary: rows of the policy's head.
        max_logits: of both together; a row is the least there is.
    """
    edges = {0, max(num_rows, 1)}  # also without rows there is a slice, for a rank's gradients to be zeros
    of_row = {}
    for span in spans:
        edges |= {span.start, span.stop}
        of_row[span.start] = span
    chunks: list[tuple[slice, TeacherSpan | None]] = []
    for first, last in itertools.pairwise(sorted(edges)):
        whole = of_row.get(first)
        width = vocabulary
        if whole is not None:
            width *= 2  # further distributions of the chunk: the teacher's, or the policy's without its likeliest
        step = max(1, max_logits // width)
        for start in range(first, last, step):
            stop = min(start + step, last)
            chunks.append((slice(start, stop), None if whole is None else whole.part(start, stop)))
    return chunks


def span_divergence(
    logits: Tensor, normaliser: Tensor, span: TeacherSpan, targets: TeacherTargets, fp32: bool
) -> Tensor:
    """[r] divergences of a chunk, with a gradient of the policy's logits.

    Args:
        logits: [r, V] of the policy, over its temperature.
        normaliser: [r] their logsumexp.
        span: the rows' teacher.
        targets: the measure.
        fp32: multiply in float32, also where autocast would not.
    """
    scores = span.scores
    if scores.top_ids is not None:
        assert scores.top_logp is not None
        top_ids = scores.top_ids[span.index]  # [r, k]
        teacher = with_rest(scores.top_logp[span.index])
        return targets.divergence(policy_at(logits, normaliser, top_ids), teacher)
    assert scores.hidden is not None
    assert scores.lm_head is not None
    # Rows behind those of the other head are padding: nothing is ever sampled there.
    common = min(logits.shape[1], len(scores.lm_head))
    with torch.no_grad():
        head = scores.lm_head[:common]
        teacher = head_logits(scores.hidden[span.index], head, targets.temperature, fp32).log_softmax(-1)  # [r, v]
    has_more = common < logits.shape[1]
    policy = logits[:, :common].log_softmax(-1) if has_more else logits - normaliser[:, None]
    return targets.divergence(policy, teacher)


def head_logits(hidden: Tensor, head: Tensor, temperature: float, fp32: bool) -> Tensor:
    """[r, V] float32 logits over a temperature.

    Args:
        hidden: [r, D].
        head: [V, D].
        temperature: above 0.
        fp32: multiply in float32, also where autocast would not.
    """
    if fp32:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = hidden.float() @ head.float().T
    else:
        logits = hidden @ head.T
    return logits.float() / temperature


def with_rest(top_logp: Tensor) -> Tensor:
    """[r, k + 1]: the likeliest tokens' log-probabilities and that of all others together, at least `LEAST_REST`.

    As one token more, not left out and the likeliest divided by their sum: then a policy that moves all it has to other
    tokens, and keeps the proportions of the few, would be at no distance. Of coarser distributions every divergence
    here is at most that of the whole ones.
    """
    rest = (1.0 - top_logp.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST)
    return torch.cat([top_logp, rest.log()], -1)


def policy_at(logits: Tensor, normaliser: Tensor, top_ids: Tensor) -> Tensor:
    """[r, k + 1] log-probabilities of some tokens, and of all others together.

    Args:
        logits: [r, V].
        normaliser: [r] of all of them.
        top_ids: [r, k] all different; with k = V the others have LEAST_REST, as they have in `with_rest`.
    """
    chosen = logits.gather(-1, top_ids) - normaliser[:, None]  # [r, k]
    if top_ids.shape[1] == logits.shape[1]:
        rest = torch.full_like(chosen[:, :1], math.log(LEAST_REST))
    else:
        others = logits.scatter(-1, top_ids, -math.inf)
        rest = others.logsumexp(-1, keepdim=True) - normaliser[:, None]
    return torch.cat([chosen, rest], -1)

"""Gated delta nets over packed groups against the rule token by token, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from longrl.packing.delta_net import (
    DeltaPast,
    DeltaRows,
    DeltaWeights,
    delta_sequences,
    sequence_parallel_delta,
    shared_prefix_delta,
)
from longrl.strategies.axis import Axis
from longrl.strategies.sequence import SequenceParallel
from longrl.testing.gloo_ranks import run_on_ranks
from longrl.types import GroupSpan

KEY_HEADS, VALUE_HEADS, KEY_SIZE, VALUE_SIZE, TAPS = 2, 6, 4, 5, 4
CHANNELS = 2 * KEY_HEADS * KEY_SIZE + VALUE_HEADS * VALUE_SIZE
SIZES = (KEY_HEADS, VALUE_HEADS, KEY_SIZE, VALUE_SIZE)


def random_layer(num_rows, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    rows = DeltaRows(normal(num_rows, CHANNELS), normal(num_rows, VALUE_HEADS), normal(num_rows, VALUE_HEADS))
    weights = DeltaWeights(normal(CHANNELS, TAPS), normal(VALUE_HEADS), normal(VALUE_HEADS), *SIZES)
    return rows, weights


def token_by_token(rows: DeltaRows, weights: DeltaWeights) -> Tensor:
    """[R, V, F] of one sequence: convolution by hand, then the rule with the whole state at every token."""
    mixed, decay, beta = rows
    outputs = []
    state = mixed.new_zeros(VALUE_HEADS, KEY_SIZE, VALUE_SIZE)
    for row in range(len(mixed)):
        seen = mixed.new_zeros(CHANNELS)
        for tap in range(TAPS):
            if row - tap >= 0:
                seen = seen + mixed[row - tap] * weights.conv[:, TAPS - 1 - tap]
        seen = seen * torch.sigmoid(seen)
        query, key, value = seen.split([KEY_HEADS * KEY_SIZE, KEY_HEADS * KEY_SIZE, VALUE_HEADS * VALUE_SIZE])
        query, key, value = query.view(KEY_HEADS, -1), key.view(KEY_HEADS, -1), value.view(VALUE_HEADS, -1)
        heads = []
        for head in range(VALUE_HEADS):
            shared = head // (VALUE_HEADS // KEY_HEADS)
            k = key[shared] / (key[shared].square().sum() + 1e-6).sqrt()
            q = query[shared] / (query[shared].square().sum() + 1e-6).sqrt() / KEY_SIZE**0.5
            step = torch.log1p(torch.exp(decay[row, head] + weights.decay_bias[head]))
            kept = torch.exp(-torch.exp(weights.decay_log[head]) * step) * state[head]
            heads.append(kept + beta[row, head].sigmoid() * torch.outer(k, value[head] - kept.T @ k))
            outputs.append(heads[-1].T @ q)
        state = torch.stack(heads)
    return torch.stack(outputs).view(len(mixed), VALUE_HEADS, VALUE_SIZE)


def one_by_one(rows: DeltaRows, weights: DeltaWeights, spans: tuple[GroupSpan, ...]) -> Tensor:
    """What `shared_prefix_delta` gives, each completion computed behind its whole prompt."""
    output = rows.mixed.new_zeros(len(rows.mixed), VALUE_HEADS, VALUE_SIZE)
    for span in spans:
        prompt = torch.arange(span.start, span.start + span.prompt_tokens)
        start = span.start + span.prompt_tokens
        for count in (0, *span.completion_tokens):
            index = torch.cat([prompt, torch.arange(start, start + count)])
            alone = token_by_token(DeltaRows(*(values[index] for values in rows)), weights)
            output = output.index_copy(0, index, alone)  # the prompt's rows are the same every time
            start += count
    return output


def layout(*groups: tuple[int, tuple[int, ...]]) -> tuple[GroupSpan, ...]:
    spans = []
    start = 0
    for prompt, completions in groups:
        spans.append(GroupSpan(start, prompt, completions))
        start = spans[-1].stop
    return tuple(spans)


def gradients_of(output: Tensor, rows: DeltaRows, weights: DeltaWeights) -> list[Tensor]:
    loss = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum()
    return list(torch.autograd.grad(loss, [*rows, weights.conv, weights.decay_log, weights.decay_bias]))


LAYOUTS = {
    "completions of 0, 1 and 3 tokens": layout((9, (3, 0, 1))),
    "several groups, edges within chunks": layout((70, (5, 66)), (3, (1, 2, 4)), (130, (2,)), (1, (1, 1))),
    "prompts shorter than the convolution": layout((1, (3, 1)), (2, (2, 7)), (3, (1, 0))),
    "one completion alone": layout((5, (4,)), (2, ())),
    "a chunk exactly": layout((64, (64, 1))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_groups_are_the_rule_token_by_token(name):
    spans = LAYOUTS[name]
    padding = 2
    rows, weights = random_layer(spans[-1].stop + padding)
    expected = one_by_one(rows, weights, spans)
    found = shared_prefix_delta(rows, weights, spans)
    assert not found[spans[-1].stop :].any()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients_of(found, rows, weights), gradients_of(expected, rows, weights), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=3))
def test_any_layout_is_the_rule_token_by_token(groups):
    spans = layout(*((prompt, tuple(completions)) for prompt, completions in groups))
    rows, weights = random_layer(spans[-1].stop)
    found = shared_prefix_delta(rows, weights, spans)
    torch.testing.assert_close(found, one_by_one(rows, weights, spans), rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.data())
def test_a_sequence_in_two_parts_is_the_sequence(lengths, data):
    """What a part hands on is all that the next one needs, also where it is shorter than the convolution."""
    rows, weights = random_layer(sum(lengths))
    whole, end = delta_sequences(rows, weights, tuple(lengths))
    cuts = [data.draw(st.integers(0, length)) for length in lengths]
    past = DeltaPast(*(values.new_zeros(values.shape) for values in end))
    outputs: list[list[Tensor]] = [[] for _ in lengths]
    for part in range(2):
        start = 0
        slices = []
        for length, cut in zip(lengths, cuts, strict=True):
            slices.append(slice(start, start + cut) if part == 0 else slice(start + cut, start + length))
            start += length
        here = [index for index, each in enumerate(slices) if each.stop > each.start]
        if not here:
            continue
        counts = tuple(slices[index].stop - slices[index].start for index in here)
        found, ends = delta_sequences(
            rows.part([slices[index] for index in here]), weights, counts, DeltaPast(*(each[here] for each in past))
        )
        past = DeltaPast(*(each.index_copy(0, torch.tensor(here), new) for each, new in zip(past, ends, strict=True)))
        for index, output in zip(here, found.split(counts), strict=True):
            outputs[index].append(output)
    joined = torch.cat([output for parts in outputs for output in parts])
    torch.testing.assert_close(joined, whole, rtol=1e-9, atol=1e-9)
    for found, expected in zip(past, end, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_gradient_to_a_past_is_exact():
    rows, weights = random_layer(5)
    past = DeltaPast(
        torch.randn(2, TAPS - 1, CHANNELS, dtype=torch.float64, requires_grad=True),
        torch.randn(2, VALUE_HEADS, KEY_SIZE, VALUE_SIZE, dtype=torch.float64, requires_grad=True),
    )

    def both(context, state):
        output, end = delta_sequences(rows, weights, (2, 3), DeltaPast(context, state))
        return output, *end

    assert torch.autograd.gradcheck(both, tuple(past))


def test_half_precision_computes_the_rule_in_float32_also_under_autocast():
    rows, weights = random_layer(40, dtype=torch.bfloat16)
    spans = layout((20, (10, 10)))
    plain = shared_prefix_delta(rows, weights, spans)
    assert plain.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = shared_prefix_delta(rows, weights, spans)
    torch.testing.assert_close(mixed, plain)
    exact = shared_prefix_delta(DeltaRows(*(v.double() for v in rows)), as_double(weights), spans)
    assert (plain.double() - exact).norm() < 0.02 * exact.norm()


def as_double(weights):
    tensors = (weights.conv.double(), weights.decay_log.double(), weights.decay_bias.double())
    return DeltaWeights(*tensors, *SIZES)


# ---- ranks that share a sequence ----


def on_a_rank(spans, total):
    axis = Axis.of(None)
    rows, weights = random_layer(total)
    sequence = SequenceParallel(axis)
    here = sequence.rows(total)
    output = sequence_parallel_delta(rows.part([here]), weights, spans, sequence)
    ramp = torch.linspace(-1, 1, total * VALUE_HEADS * VALUE_SIZE, dtype=output.dtype)
    loss = (output * ramp.view(total, VALUE_HEADS, VALUE_SIZE)[here]).sum()
    grads = torch.autograd.grad(loss, [*rows, weights.conv, weights.decay_log, weights.decay_bias])
    return output.detach(), [axis.sum(grad) for grad in grads]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_that_share_a_sequence_give_the_rows_and_gradients_of_one(ranks):
    """6 value heads on 2 key heads: on 4 ranks heads are filled up, and a key head is on two ranks."""
    spans = layout((13, (3, 0, 1)), (2, (1, 7)), (5, (4,)))
    total = -(-spans[-1].stop // 12) * 12
    rows, weights = random_layer(total)
    expected = shared_prefix_delta(rows, weights, spans)
    gradients = gradients_of(expected, rows, weights)
    found = run_on_ranks(on_a_rank, ranks, spans, total)
    torch.testing.assert_close(torch.cat([output for output, _ in found]), expected, rtol=1e-9, atol=1e-9)
    for _, grads in found:
        for ours, theirs in zip(grads, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))

"""The collectives of sequence parallelism, against the same on one rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from longrl.packing.attention import shared_prefix_attention
from longrl.packing.pack import pack
from longrl.strategies.axis import Axis
from longrl.strategies.sequence import NO_SEQUENCE_PARALLEL, HeadLayout, SequenceParallel
from longrl.types import GroupSpan
from tests.distributed import run_distributed
from tests.teachers import all_logits
from tests.tiny import assert_same_gradients, gradients, plain_model, random_completions, row, text_family

HEADS = [(6, 6), (6, 2), (7, 1), (28, 4), (12, 3), (2, 2)]


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 9))
def test_a_plan_deals_every_head_once_and_wastes_less_than_a_key_head_per_rank(key_heads, queries, ranks):
    plan = HeadLayout.make(key_heads * queries, key_heads, ranks)
    query = torch.arange(1.0, key_heads * queries + 1)[:, None, None]
    key = torch.arange(1.0, key_heads + 1)[:, None, None]
    dealt = plan.scatter(query, key, -key)
    assert dealt.shape == (ranks * plan.per_rank, plan.size + 2, 1, 1)
    assert torch.equal(plan.gather(dealt[:, :-2]), query)
    for queries_here, own_key, own_value in zip(dealt[:, :-2], dealt[:, -2], dealt[:, -1], strict=True):
        assert own_value == -own_key
        for head in queries_here[queries_here > 0]:
            assert (head - 1) // queries == own_key - 1
    least = -(-key_heads * queries // ranks)
    assert least <= plan.per_rank * plan.size < least + queries


def test_28_heads_on_8_ranks_are_padded_to_32():
    plan = HeadLayout.make(28, 4, 8)
    assert (plan.parts, plan.size, plan.per_rank) == (2, 4, 1)


def sharded_attention(heads, key_heads, length):
    axis = Axis.of(None)
    sequence = SequenceParallel(axis)
    query, key, value, grad = attention_inputs(heads, key_heads, length)
    rows = sequence.rows(length)
    own = [tensor[:, rows].clone().requires_grad_() for tensor in (query, key, value)]
    *here, plan = sequence.to_heads(*own)
    output = sequence.to_rows(shared_prefix_attention(*here, SPANS, 0.5), plan)
    output.backward(grad[:, rows])
    return output.detach(), *(tensor.grad for tensor in own)


SPANS = (GroupSpan(0, 3, (2, 1)), GroupSpan(6, 2, (2,)))  # 10 rows, then padding


def attention_inputs(heads, key_heads, length):
    generator = torch.Generator().manual_seed(heads)
    counts = (heads, key_heads, key_heads, heads)
    return [torch.randn(count, length, 4, generator=generator, dtype=torch.float64) for count in counts]


@pytest.mark.parametrize("ranks", [2, 4])
def test_attention_over_ranks_is_attention_on_one(ranks):
    for heads, key_heads in HEADS:
        query, key, value, grad = attention_inputs(heads, key_heads, 12)
        inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
        output = shared_prefix_attention(*inputs, SPANS, 0.5)
        output.backward(grad)
        found = run_distributed(sharded_attention, ranks, heads, key_heads, 12)
        for place, wanted in enumerate([output, query.grad, key.grad, value.grad]):
            joined = torch.cat([rank[place] for rank in found], 1)
            torch.testing.assert_close(joined, wanted, rtol=1e-12, atol=1e-12)


def sharded_rows(count):
    sequence = SequenceParallel(Axis.of(None))
    hidden, positions, weights = scored_inputs(count)
    own = hidden[sequence.rows(len(hidden))].clone().requires_grad_()
    scored = sequence.scored(own, positions)
    values = sequence.gather((scored * 2).sum(-1), count)
    (values * weights).sum().backward()
    return values.detach(), own.grad, scored.detach(), sequence.share(count)


def scored_inputs(count):
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(8, 3, generator=generator)
    return hidden, torch.randint(0, 8, (count,), generator=generator), torch.randn(count, generator=generator)


@pytest.mark.parametrize("ranks", [2, 4])
def test_scored_rows_are_dealt_evenly_and_scores_come_to_all(ranks):
    for count in (0, 1, 3, 13):
        hidden, positions, weights = scored_inputs(count)
        hidden.requires_grad_()
        values = (NO_SEQUENCE_PARALLEL.scored(hidden, positions) * 2).sum(-1)
        (NO_SEQUENCE_PARALLEL.gather(values, count) * weights).sum().backward()
        found = run_distributed(sharded_rows, ranks, count)
        for own_values, _, scored, share in found:
            torch.testing.assert_close(own_values, values)
            assert torch.equal(scored, hidden[positions[share]])
            assert abs(len(scored) - count / ranks) < 1
        torch.testing.assert_close(torch.cat([grad for _, grad, _, _ in found]), hidden.grad)


def entropy_case():
    family = text_family()
    prompts = [family.render(row(str(index)), "Which one? " * (1 + index)) for index in range(2)]
    return family, family.build(), prompts, random_completions(family, [[3, 7, 4], [5, 1, 6]])


def entropy_gradients(max_tokens):
    """(entropies, gradients of their weighted sum over all ranks) of packed groups."""
    sequence = SequenceParallel(Axis.of(None))
    family, model, prompts, completions = entropy_case()
    entropies = torch.zeros(26)
    for packed in pack(prompts, completions, max_tokens):
        output = family.forward(model, packed, {}, 0.7, sequence, entropy_gradient=True)
        entropies[packed.token_index] = output.entropy.detach()
        weights = torch.linspace(-1, 2, 26)[packed.token_index]
        (output.entropy * weights).sum().backward()
    return entropies, {name: sequence.axis.sum(grad) for name, grad in gradients(model).items()}


def test_gradients_of_entropies_are_those_of_one_rank_and_of_separate_sequences():
    """Packed in one sequence and in several, against dense distributions of one forward for each completion."""
    family, model, prompts, completions = entropy_case()
    plain = plain_model(model, family)
    logp = (all_logits(plain, prompts, completions) / 0.7).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    (entropy * torch.linspace(-1, 2, 26)).sum().backward()
    for ranks, max_tokens in ((1, 60), (2, 60), (2, 10_000)):
        for found, grads in run_distributed(entropy_gradients, ranks, max_tokens):
            torch.testing.assert_close(found.double(), entropy.detach(), rtol=1e-5, atol=1e-6)
            assert_same_gradients(grads, gradients(plain), 1e-5)

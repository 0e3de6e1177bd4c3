"""`HFEngine` on models with gated delta nets: one state per prompt, forked to its completions, whatever its length."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longrl.engines import prefix_cache
from longrl.engines.hf import HFEngine
from longrl.types import SamplingParams
from tests.tiny import plain_model, qwen3_5_text_family, row, separate_logps

SAMPLING = SamplingParams(num_generations=3, max_completion_tokens=6)
GREEDY = SamplingParams(num_generations=1, max_completion_tokens=6, temperature=0.0)
LENGTHS = (1, 2, 3, 4, 29)
"""Of the prompts; the convolution sees 4 rows."""


def prompts_of(family, lengths):
    whole = family.render(row(), "Which one comes first, and which one after it? " * 8)
    return [
        dataclasses.replace(
            whole, id=str(length), input_ids=whole.input_ids[-length:], position_ids=torch.arange(length)[None]
        )
        for length in lengths
    ]


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "experts"])
def given(request):
    family = qwen3_5_text_family(experts=request.param)
    model = family.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in family.layers(model):  # what is remembered should matter
            for parameter in layer.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return family, model, prompts_of(family, LENGTHS)


def generate(family, model, prompts, sampling=SAMPLING, **options):
    return HFEngine(**options).generate(family, model, prompts, {}, sampling, seed=1)


def tokens_and_logps(groups):
    every = [completion for group in groups for completion in group]
    return [c.token_ids.tolist() for c in every], torch.cat([c.logprobs for c in every])


@pytest.mark.parametrize("sampling", [SAMPLING, GREEDY], ids=["drawn", "greedy"])
def test_a_forked_state_is_one_forward_per_completion(given, sampling):
    family, model, prompts = given
    groups = generate(family, model, prompts, sampling)
    wanted = separate_logps(plain_model(model, family), prompts, [[c.token_ids for c in group] for group in groups])
    torch.testing.assert_close(tokens_and_logps(groups)[1].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 17])
def test_chunks_carry_the_state(given, chunk):
    """They end within prompts, and after fewer rows than the convolution sees."""
    family, model, prompts = given
    wanted, wanted_logps = tokens_and_logps(generate(family, model, prompts))
    found, logps = tokens_and_logps(generate(family, model, prompts, prefill_chunk_tokens=chunk))
    assert found == wanted
    torch.testing.assert_close(logps, wanted_logps, rtol=1e-5, atol=1e-5)


def test_completions_of_a_prompt_part_after_its_state(given):
    """Else a state that is not forked, or shared by mistake, would not show."""
    family, model, prompts = given
    groups = generate(family, model, prompts)
    assert all(len({tuple(c.token_ids.tolist()) for c in group}) > 1 for group in groups)


def test_a_prompts_state_is_computed_once_per_group(given, monkeypatch):
    family, model, prompts = given
    calls = []

    def counted(rows, weights, lengths, past=None):
        calls.append(lengths)
        return compute(rows, weights, lengths, past)

    compute = prefix_cache.delta_sequences
    monkeypatch.setattr(prefix_cache, "delta_sequences", counted)
    generate(family, model, prompts)
    num_layers = sum(hasattr(layer, "linear_attn") for layer in family.layers(model))
    steps = SAMPLING.max_completion_tokens - 1  # the last token is not fed back
    assert calls == [LENGTHS] * num_layers + [(1,) * (3 * len(prompts))] * (steps * num_layers)


@pytest.mark.parametrize("length", [40, 90])
def test_a_completion_holds_a_state_whatever_the_length_of_its_prompt(given, length, monkeypatch):
    family, model, _ = given
    caches = []

    class Cache(prefix_cache.PrefixCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr(prefix_cache, "PrefixCache", Cache)
    generate(family, model, prompts_of(family, (length, length)))
    (cache,) = caches
    config = family.config
    key_width = config.linear_num_key_heads * config.linear_key_head_dim
    value_width = config.linear_num_value_heads * config.linear_value_head_dim
    state = config.linear_key_head_dim * value_width + 3 * (
        2 * key_width + value_width
    )  # and 3 rows of the convolution
    assert [sum(part[0].numel() for part in past) for past in cache.completion_pasts.values()] == [state] * 3
    assert {len(past.state) for past in cache.completion_pasts.values()} == {2 * 3}
    assert not cache.prompt_pasts  # forked, so gone
    tokens = {
        name: {pair[0].shape[-2] for pair in getattr(cache, name).values()} for name in ("prompts", "completions")
    }
    assert tokens == {"prompts": {2 * length}, "completions": {SAMPLING.max_completion_tokens}}
    assert len(cache.prompts) == len(cache.completions) == 1  # of the one layer that attends

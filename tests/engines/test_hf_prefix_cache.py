"""Chunked prefill and tiled decoding are the unchunked ones, and bound what is held."""

import dataclasses

import pytest
import torch

from longrl.engines import prefix_cache
from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.packing.kernels import VarlenBatch
from longrl.types import GroupSpan, SamplingParams
from tests.tiny import mixed_prompts, plain_model, qwen3_5_family, row, separate_logps, text_family, vl_family

SAMPLING = SamplingParams(num_generations=3, max_completion_tokens=6)
FULL_SHARD = 1 << 20


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3", "qwen3_5"])
def given(request):
    """Three prompts of different length; those of the vision models with videos and M-RoPE; a hybrid model."""
    if request.param == "qwen3":
        family = text_family("qwen3")
        texts = ["one", "two words, and then some more of them", "three"]
        prompts = [family.render(row(str(i)), text) for i, text in enumerate(texts)]
    else:
        family = (vl_family if request.param == "qwen2_5_vl" else qwen3_5_family)(freeze_vision_encoder=True)
        prompts = mixed_prompts(family)
    model = family.build()
    return family, model, prompts, FeatureCache(family).get_or_encode(model, prompts)


def generate(given, sampling=SAMPLING, **options):
    family, model, prompts, features = given
    return HFEngine(**options).generate(family, model, prompts, features, sampling, seed=1)


def tokens_and_logps(groups):
    every = [completion for group in groups for completion in group]
    return [c.token_ids.tolist() for c in every], torch.cat([c.logprobs for c in every])


@pytest.mark.parametrize("chunk", [1, 7, 16, 50])
def test_chunked_prefill_samples_the_same_tokens_with_the_same_logprobs(given, chunk):
    wanted, wanted_logps = tokens_and_logps(generate(given, prefill_chunk_tokens=FULL_SHARD))
    found, logps = tokens_and_logps(generate(given, prefill_chunk_tokens=chunk))
    assert found == wanted
    torch.testing.assert_close(logps, wanted_logps, rtol=1e-5, atol=1e-5)


def test_chunked_prefill_has_the_logprobs_of_the_plain_model(given):
    family, model, prompts, _ = given
    groups = generate(given, prefill_chunk_tokens=11)
    wanted = separate_logps(plain_model(model, family), prompts, [[c.token_ids for c in group] for group in groups])
    torch.testing.assert_close(tokens_and_logps(groups)[1].double(), wanted, rtol=1e-5, atol=1e-5)


def test_greedy_tokens_do_not_depend_on_chunks_or_tiles(given, monkeypatch):
    greedy = dataclasses.replace(SAMPLING, num_generations=1, temperature=0.0)
    wanted, _ = tokens_and_logps(generate(given, greedy, prefill_chunk_tokens=FULL_SHARD))
    monkeypatch.setattr(prefix_cache, "TILE_KEYS", 5)
    monkeypatch.setattr(prefix_cache, "MAX_SCORES", 0)
    found, _ = tokens_and_logps(generate(given, greedy, prefill_chunk_tokens=9))
    assert found == wanted


@pytest.mark.parametrize("tile", [1, 4, 9])
def test_decoding_in_tiles_is_exact(given, tile, monkeypatch):
    wanted, wanted_logps = tokens_and_logps(generate(given))  # short prompts, in one padded product
    monkeypatch.setattr(prefix_cache, "TILE_KEYS", tile)
    monkeypatch.setattr(prefix_cache, "MAX_SCORES", 0)
    found, logps = tokens_and_logps(generate(given))
    assert found == wanted
    torch.testing.assert_close(logps, wanted_logps, rtol=1e-5, atol=1e-5)


def test_no_activation_has_more_rows_than_a_chunk(given):
    family, model, prompts, _ = given
    rows = []
    note = lambda layer, states, output: rows.append(output.shape[1])  # noqa: E731
    hooks = [layer.register_forward_hook(note) for layer in family.layers(model)]
    generate(given, prefill_chunk_tokens=16)
    for hook in hooks:
        hook.remove()
    total, layers = sum(len(prompt.input_ids) for prompt in prompts), len(family.layers(model))
    assert max(rows) == 16
    assert rows[: total // 16 * layers] == [16] * (total // 16 * layers)


def test_tiles_are_as_many_for_every_prompt_and_never_empty():
    tiles, batch = prefix_cache._tile_batch((10, 2), num_queries=3, tile_keys=4)
    assert tiles == 2  # three of at most 4 keys would leave one of the short prompt's empty
    assert (batch.key_lengths, batch.query_lengths) == ((5, 5, 1, 1), (3, 3, 3, 3))


def test_a_chunk_sees_itself_and_what_its_first_prompt_had_before():
    spans = (GroupSpan(0, 10, ()), GroupSpan(10, 3, ()), GroupSpan(13, 9, ()))
    assert prefix_cache._chunk_batches(spans, 0, 8) == (VarlenBatch((8,), (8,), True), range(0))
    assert prefix_cache._chunk_batches(spans, 8, 16) == (VarlenBatch((2, 3, 3), (2, 3, 3), True), range(0, 8))
    assert prefix_cache._chunk_batches(spans, 16, 22) == (VarlenBatch((6,), (6,), True), range(13, 16))


def test_a_chunk_without_tokens_is_an_error():
    with pytest.raises(ValueError, match=r"prefill_chunk_tokens must be at least 1, got 0"):
        HFEngine(prefill_chunk_tokens=0)

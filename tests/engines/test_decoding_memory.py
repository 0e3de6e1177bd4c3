"""How many prompts are decoded together, from free memory."""

import logging
from types import SimpleNamespace

import pytest
import torch

from longrl.engines import decoding_memory, hf, prefix_cache
from longrl.engines.decoding_memory import DecodingMemory, free_bytes
from longrl.engines.hf import HFEngine
from longrl.types import SamplingParams
from tests.tiny import qwen3_5_text_family, row, text_family

SAMPLING = SamplingParams(num_generations=3, max_completion_tokens=6)


def memory(**changes):
    values = {
        "token": 10.0, "completion": 100.0, "tile": 0.0, "always": 1000.0, "num_generations": 2,
        "padded_tokens": 0.0, "tile_keys": 64,
    }  # fmt: skip
    return DecodingMemory(**values | changes)


def test_bytes_by_hand():
    """1000 always, 12 tokens of 10, and 4 completions of 100."""
    assert memory().needed([5, 7]) == 1000 + 120 + 400
    assert memory(padded_tokens=1e9).needed([5, 7]) == 1000 + 120 + 140 + 400  # a copy, of 7 tokens each
    assert memory(padded_tokens=3).needed([5, 7]) == 1000 + 120 + 30 + 400
    assert memory(tile=1.0, tile_keys=3).needed([5, 7]) == 1000 + 120 + 400 + 4 * 3


@pytest.mark.parametrize(("free", "count"), [(1, 1), (1519, 1), (1521, 2), (1e9, 3)])
def test_as_many_prompts_as_fit_into_nine_tenths_and_at_least_one(free, count):
    assert memory().num_prompts([5, 7, 400], free / decoding_memory.USED_SHARE) == count


@pytest.mark.parametrize("make", [lambda: text_family("qwen3"), qwen3_5_text_family], ids=["qwen3", "qwen3.5"])
def test_keys_values_and_states_of_the_model_are_what_the_cache_holds(monkeypatch, make):
    """All that `PrefixCache` allocates for prompts and completions, to the byte."""
    family = make()
    model = family.build()
    prompts = [family.render(row(str(i)), "word " * 9 * (i + 1)) for i in range(2)]
    caches = []

    class Cache(prefix_cache.PrefixCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr(prefix_cache, "PrefixCache", Cache)
    HFEngine().generate(family, model, prompts, {}, SAMPLING, seed=1)
    (cache,) = caches
    held = [tensor.nbytes for pair in (*cache.prompts.values(), *cache.completions.values()) for tensor in pair]
    found = DecodingMemory.of(family, model, SAMPLING, chunk_tokens=1, max_scores=0, tile_keys=4096)
    tokens = sum(len(prompt.input_ids) for prompt in prompts) + 2 * 3 * 6
    assert sum(held) == found.token * tokens
    states = sum(part.nbytes for past in cache.completion_pasts.values() for part in past)
    delta = family.planning_sizes()[0].delta_nets
    assert states == (2 * 3 * delta.num_layers * delta.state_bytes(4) if delta else 0)
    assert found.completion >= 6 * found.token + states / (2 * 3)


def test_free_is_what_the_driver_has_left_and_what_torch_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 15)
    assert free_bytes(torch.device("cuda", 0)) == 75
    assert free_bytes(torch.device("cpu")) is None


def together(monkeypatch, free, **options):
    """Prompts of each batch that are decoded together, of three with 2 completions each."""
    family = text_family()
    model = family.build()
    prompts = [family.render(row(str(i)), "word") for i in range(3)]
    monkeypatch.setattr(hf, "free_bytes", lambda device: free)
    counts = []
    engine = HFEngine(**options)

    def decode(family, model, prompts, features, sampling, uniform):
        counts.append(len(prompts))
        assert len(uniform) == 2 * len(prompts)
        return [[]] * len(prompts)

    monkeypatch.setattr(engine, "_decode", decode)
    groups = engine.generate(family, model, prompts, {}, SamplingParams(2, 6), seed=1)
    assert len(groups) == 3
    return counts


def test_the_engine_decodes_what_fits_and_says_so_once(monkeypatch, caplog):
    room = SimpleNamespace(of=lambda *args, **options: memory(token=0.0))  # 1000, and 200 of each prompt
    monkeypatch.setattr(hf, "DecodingMemory", room)
    with caplog.at_level(logging.INFO, logger="longrl"):
        assert together(monkeypatch, 1400 / decoding_memory.USED_SHARE) == [2, 1]
    (line,) = [record.getMessage() for record in caplog.records if "decoded together" in record.getMessage()]
    assert line.startswith("2 of 3 prompts are decoded together, with 2 completions each")


def test_a_number_given_wins_and_a_cpu_has_the_number_of_before(monkeypatch):
    assert together(monkeypatch, 1e12, max_sequences=3) == [1, 1, 1]
    assert together(monkeypatch, None, max_sequences=4) == [2, 1]
    assert together(monkeypatch, None) == [3]
    monkeypatch.setattr(hf, "SEQUENCES_ON_CPU", 2)
    assert together(monkeypatch, None) == [1, 1, 1]
    assert HFEngine().max_sequences is None

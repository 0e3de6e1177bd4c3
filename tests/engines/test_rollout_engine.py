from types import SimpleNamespace

import pytest
import torch

from longrl.engines.hf import HFEngine
from longrl.engines.rollout_engine import (
    GenerationShard,
    RolloutEngine,
    RolloutRequest,
    gather_groups,
    generate_shards,
    generation_shards,
    sampling_ids,
)
from longrl.engines.vllm import VLLMEngine
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Completion, Group, SamplingParams
from tests.tiny import row, text_family


class Silent(RolloutEngine):
    def sync(self, family, model, step):
        pass

    def generate(self, *args, **options):
        return []


def test_options_that_decide_answers_are_part_of_an_engines_identity_and_others_are_not():
    assert HFEngine(max_sequences=3, prefill_chunk_tokens=8).identity() == {"prefill_chunk_tokens": 8}
    assert VLLMEngine(max_num_seqs=3, sleep=False).identity() == VLLMEngine().identity()
    assert VLLMEngine(enforce_eager=True).identity() != VLLMEngine().identity()


def test_an_engine_that_does_not_tell_its_identity_cannot_be_evaluated_but_trains():
    assert Silent().max_length() is None
    with pytest.raises(ValueError, match=r"which options of Silent decide its answers; define its `identity`"):
        Silent().identity()


def test_vllm_is_one_of_the_libraries_that_compute_where_it_does():
    assert HFEngine().library_versions().keys() == {"torch", "transformers"}
    assert VLLMEngine().library_versions().keys() == {"torch", "transformers", "vllm"}


def test_copies_of_a_prompt_have_the_same_ids_over_any_number_of_ranks():
    stream = ["a", "b", "b", "a", "c", "a"]
    wanted = ["a", "b", "b (copy 1)", "a (copy 1)", "c", "a (copy 2)"]
    assert sampling_ids(stream, SINGLE_RANK) == wanted
    for size in (2, 3, 4):
        shares = [stream[rank::size] for rank in range(size)]
        for rank, share in enumerate(shares):
            axis = SimpleNamespace(rank=rank, size=size, gather=lambda own, shares=shares: shares)
            assert sampling_ids(share, axis) == wanted[rank::size]


@pytest.mark.parametrize(("num_prompts", "size"), [(1, 1), (5, 2), (3, 3), (2, 4), (1, 8), (3, 16)])
def test_every_completion_is_generated_by_one_rank(num_prompts, size):
    ranks = [generation_shards(num_prompts, 8, rank, size) for rank in range(size)]
    flat = [
        (shard.prompt, index)
        for shards in ranks
        for shard in shards
        for index in range(shard.first, shard.first + shard.count)
    ]
    assert flat == [(prompt, index) for prompt in range(num_prompts) for index in range(8)]
    if num_prompts >= size:  # prompts are prefilled once
        assert all(shard.count == 8 for shards in ranks for shard in shards)


def scored(prompt, first, count):
    """Completions that carry their number, so do their rewards."""
    numbers = torch.arange(first, first + count)
    completions = [Completion(number[None], torch.zeros(1), str(int(number)), "stop") for number in numbers]
    return Group(prompt, completions, numbers.float(), {"accuracy": -numbers.float()}, numbers % 2 == 0)


def test_shards_of_all_ranks_become_groups_of_all_prompts():
    prompts = [text_family().render(row(name), "What?") for name in ("one", "two")]
    ranks = [
        [(shard, scored(prompts[shard.prompt], shard.first, shard.count)) for shard in generation_shards(2, 6, rank, 4)]
        for rank in range(4)
    ]
    everything = [item for local in reversed(ranks) for item in local]  # no order of ranks is promised
    weights = {"accuracy": -1.0}
    sent = [
        (shard, group.completions, group.rewards, group.reward_parts, group.valid, weights)
        for shard, group in everything
    ]
    axis = SimpleNamespace(size=4, gather_list=lambda local, num_chunks: sent)
    groups = gather_groups(prompts, ranks[0], axis, 1)
    for group, prompt in zip(groups, prompts, strict=True):
        assert group.prompt is prompt
        assert [completion.text for completion in group.completions] == ["0", "1", "2", "3", "4", "5"]
        assert group.rewards.tolist() == [0, 1, 2, 3, 4, 5]
        assert group.reward_parts["accuracy"].tolist() == [0, -1, -2, -3, -4, -5]
        assert group.part_weights == weights
        assert group.valid.tolist() == [True, False] * 3


def test_a_prompts_experts_travel_once_per_group():
    """Ranks that share its completions each prefill it."""
    experts = torch.zeros(3, 2, 2, dtype=torch.int16)

    class Noting(Silent):
        def generate(self, family, model, prompts, features, sampling, seed, first=0):
            empty = torch.zeros(0, dtype=torch.int64)
            of_prompt = [experts] + [None] * (sampling.num_generations - 1)
            return [[Completion(empty, torch.zeros(0), "", "stop", None, each) for each in of_prompt] for _ in prompts]

    prompt = text_family().render(row("one"), "What?")
    request = RolloutRequest([prompt], [prompt], [SamplingParams(num_generations=5)], seed=0)
    found = []
    for rank in range(3):
        (shards,) = generate_shards(Noting(), None, None, request, {}, SimpleNamespace(rank=rank, size=3))
        found += [answer.prompt_experts for _, group in shards for answer in group.completions]
    assert [each is experts for each in found] == [True] + 4 * [False]


def test_a_rank_alone_has_its_groups_already():
    prompt = text_family().render(row("one"), "What?")
    group = scored(prompt, 0, 4)
    assert gather_groups([prompt], [(GenerationShard(0, 0, 4), group)], SINGLE_RANK, 1) == [group]

from types import SimpleNamespace

import pytest
import torch

from longrl.engines.rollout_engine import GenerationShard, gather_groups, generation_shards
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Completion, Group
from tests.tiny import row, text_family


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
    sent = [(shard, group.completions, group.rewards, group.reward_parts, group.valid) for shard, group in everything]
    axis = SimpleNamespace(size=4, gather_list=lambda local, num_chunks: sent)
    groups = gather_groups(prompts, ranks[0], axis, 1)
    for group, prompt in zip(groups, prompts, strict=True):
        assert group.prompt is prompt
        assert [completion.text for completion in group.completions] == ["0", "1", "2", "3", "4", "5"]
        assert group.rewards.tolist() == [0, 1, 2, 3, 4, 5]
        assert group.reward_parts["accuracy"].tolist() == [0, -1, -2, -3, -4, -5]
        assert group.valid.tolist() == [True, False] * 3


def test_a_rank_alone_has_its_groups_already():
    prompt = text_family().render(row("one"), "What?")
    group = scored(prompt, 0, 4)
    assert gather_groups([prompt], [(GenerationShard(0, 0, 4), group)], SINGLE_RANK, 1) == [group]

import pytest
import torch
from hypothesis import given, strategies as st

from longrl.packing.pack import pack
from longrl.types import Continuation, Prompt
from tests.tiny import row


def prompt(tokens, name="p"):
    return Prompt(name, torch.arange(100, 100 + tokens), torch.arange(tokens).expand(3, -1) + 5, (), row(name))


def test_layout_by_hand():
    (packed,) = pack([prompt(2)], [[torch.tensor([1, 2]), torch.tensor([3])]], max_tokens=99)
    assert packed.input_ids.tolist() == [100, 101, 1, 2, 3]
    assert packed.position_ids[0].tolist() == [5, 6, 7, 8, 7]
    assert packed.predict_from.tolist() == [1, 2, 1]
    assert packed.target_ids.tolist() == [1, 2, 3]
    assert packed.completion_index.tolist() == [0, 0, 1]
    assert packed.token_index.tolist() == [0, 1, 2]


def shown(ids, sampled, positions=None):
    """A completion with positions on three axes."""
    positions = None if positions is None else torch.tensor(positions).expand(3, -1)
    return Continuation(torch.tensor(ids), sampled=torch.tensor(sampled, dtype=torch.bool), position_ids=positions)


@pytest.mark.parametrize("max_tokens", [99, 7], ids=["together", "split"])
def test_shown_tokens_are_read_and_not_scored(max_tokens):
    """A token behind those that were shown is predicted from the last of them, whether they come first or between."""
    group = [shown([1, 2, 3, 4], [1, 0, 0, 1], [0, 1, 1, 2]), shown([5, 6], [0, 1]), torch.tensor([7])]
    parts = pack([prompt(2)], [group], max_tokens)
    assert torch.cat([part.token_index for part in parts]).tolist() == [0, 1, 2, 3]
    assert torch.cat([part.completion_index for part in parts]).tolist() == [0, 0, 1, 2]
    assert torch.cat([part.target_ids for part in parts]).tolist() == [1, 4, 6, 7]
    if len(parts) == 1:
        (packed,) = parts
        assert packed.input_ids.tolist() == [100, 101, 1, 2, 3, 4, 5, 6, 7]
        assert packed.position_ids[1].tolist() == [5, 6, 7, 8, 8, 9, 7, 8, 7]
        assert packed.predict_from.tolist() == [1, 4, 6, 1]
        assert packed.shown.tolist() == [False, False, False, True, True, False, True, False, False]
        assert packed.to(torch.device("cpu"), multiple=4).shown.tolist()[-3:] == [False] * 3
    else:
        assert [part.predict_from.tolist() for part in parts] == [[1, 4], [2, 1]]
        assert [part.spans[0].completion_tokens for part in parts] == [(4,), (2, 1)]


def test_without_shown_tokens_a_mask_changes_nothing():
    plain, masked = (pack([prompt(2)], [[one]], 99)[0] for one in (torch.tensor([1, 2]), shown([1, 2], [1, 1], [0, 1])))
    assert masked.shown is None
    for name in ("input_ids", "position_ids", "predict_from", "target_ids", "completion_index", "token_index"):
        assert torch.equal(getattr(plain, name), getattr(masked, name))


groups = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=5)), min_size=1, max_size=5)


@given(groups, st.integers(12, 40))
def test_every_token_is_scored_once_from_the_position_before_it(layout, max_tokens):
    prompts = [prompt(tokens, str(i)) for i, (tokens, _) in enumerate(layout)]
    completions = [[torch.randint(0, 99, (n,)) for n in lengths] for _, lengths in layout]
    flat = torch.cat([torch.empty(0, dtype=torch.int64), *(ids for group in completions for ids in group)])
    targets, seen = torch.full((len(flat),), -1), []
    for packed in pack(prompts, completions, max_tokens):
        assert len(packed.input_ids) == packed.spans[-1].stop <= max_tokens
        targets[packed.token_index] = packed.target_ids
        seen += packed.token_index.tolist()
        before, target = packed.position_ids[:, packed.predict_from], packed.target_ids
        for where, token in zip(before.T, target, strict=True):
            following = (packed.position_ids == where[:, None] + 1).all(0)
            assert token in packed.input_ids[following]
    assert seen == list(range(len(flat)))
    assert torch.equal(targets, flat)


def test_a_completion_over_the_budget_names_the_flags():
    with pytest.raises(ValueError, match=r"'p' has 7 tokens, 12 with .* above 10, the model\.max_tokens_per_micro"):
        pack([prompt(7)], [[torch.zeros(5, dtype=torch.int64)]], max_tokens=10)


def test_a_group_over_the_budget_is_split_with_its_prompt():
    parts = pack([prompt(4)], [[torch.zeros(3, dtype=torch.int64)] * 4], max_tokens=10)
    assert [part.spans[0].completion_tokens for part in parts] == [(3, 3), (3, 3)]
    assert [part.completion_index.tolist() for part in parts] == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]

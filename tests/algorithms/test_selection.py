"""Which groups train."""

import torch

from longrl.algorithms import InOrder, drop_uniform, keep_all, mask_truncated
from longrl.types import Completion, Group, Prompt, Row


def group(rewards, accuracy=None, valid=None, finish=None) -> Group:
    prompt = Prompt(
        "p",
        torch.zeros(1, dtype=torch.long),
        torch.zeros(1, 1, dtype=torch.long),
        (),
        Row(id="p", problem="", answer=""),
    )
    finish = finish or ["stop"] * len(rewards)
    completions = [Completion(torch.zeros(1, dtype=torch.long), torch.zeros(1), "", reason) for reason in finish]
    parts = {"format": torch.zeros(len(rewards))}
    if accuracy is not None:
        parts["accuracy"] = torch.tensor(accuracy)
    return Group(
        prompt,
        completions,
        torch.tensor(rewards),
        parts,
        None if valid is None else torch.tensor(valid, dtype=torch.bool),
    )


def test_keep_all_keeps_all():
    groups = [group([1.0, 1.0]), group([0.0, 1.0])]
    assert keep_all(groups) == groups


def test_drop_uniform_drops_groups_all_right_or_all_wrong_and_keeps_order_and_identity():
    all_right, mixed, all_wrong, mixed_too = (group(r) for r in ([1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.0]))
    kept = drop_uniform([all_right, mixed, all_wrong, mixed_too])
    assert len(kept) == 2
    assert kept[0] is mixed
    assert kept[1] is mixed_too


def test_drop_uniform_looks_at_accuracy_not_at_the_blended_reward():
    wrong_but_some_well_formed = group([0.1, 0.0], accuracy=[0.0, 0.0])
    mixed_with_equal_rewards = group([0.5, 0.5], accuracy=[0.0, 1.0])
    kept = drop_uniform([wrong_but_some_well_formed, mixed_with_equal_rewards])
    assert len(kept) == 1
    assert kept[0] is mixed_with_equal_rewards


def test_drop_uniform_looks_at_valid_completions_only():
    assert drop_uniform([group([1.0, 1.0, 0.0], valid=[True, True, False])]) == []
    assert len(drop_uniform([group([1.0, 1.0, 0.0], valid=[True, False, True])])) == 1
    assert drop_uniform([group([1.0, 0.0], valid=[False, False])]) == []
    assert drop_uniform([group([1.0, 0.0], valid=[True, False])]) == []


def test_mask_truncated_makes_cut_off_completions_invalid_and_leaves_its_argument_alone():
    before = [
        group([1.0, 0.0, 1.0], valid=[True, True, False], finish=["stop", "length", "stop"]),
        group([1.0, 0.0], finish=["length", "length"]),
    ]
    after = mask_truncated(before)
    assert [g.valid.tolist() for g in after] == [[True, False, False], [False, False]]
    assert before[0].valid.tolist() == [True, True, False]
    assert before[1].valid is None
    assert after[0].completions is before[0].completions


def test_in_order_looks_for_contrast_among_what_was_not_cut_off():
    only_cut_off_differs = group([1.0, 1.0, 0.0], finish=["stop", "stop", "length"])
    contrast = group([1.0, 0.0, 0.0], finish=["stop", "stop", "length"])
    kept = InOrder([mask_truncated, drop_uniform])([only_cut_off_differs, contrast])
    assert [g.valid.tolist() for g in kept] == [[True, True, False]]
    assert len(InOrder([drop_uniform, mask_truncated])([only_cut_off_differs, contrast])) == 2

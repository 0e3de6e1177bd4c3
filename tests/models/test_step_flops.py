"""Operations of an update: by hand, and as `longrl plan` counts them."""

import dataclasses
import functools

import pytest

from longrl.models.step_flops import GroupTokens, TextCost, count_rows, peak_flops
from longrl.planning import flops
from longrl.planning.inputs import ModelSizes, Plan
from longrl.planning.micro_batches import MicroBatch
from tests.tiny import qwen3_5_text_family, text_family

COST = TextCost(layer_params=10, trained_params=10, num_layers=2, query_width=3, head_params=7, head_trains=True)


def test_rows_pairs_and_scored_rows():
    """A prompt of 4 sees 8 pairs; completions of 2 and 1 see 8 + 2 and 4 + 0.5."""
    assert count_rows([GroupTokens(4, [2, 1])]) == (7, 22.5, 3)
    assert count_rows([GroupTokens(4, [2, 1]), GroupTokens(1, [])]) == (8, 23.0, 3)


def test_what_completions_were_shown_is_read_and_not_scored():
    assert count_rows([GroupTokens(4, [2, 1], num_shown=1)]) == (7, 22.5, 2)


def test_a_forward_pass_by_hand():
    assert COST.forward_flops([GroupTokens(4, [2, 1])]) == 2 * 10 * 7 + 4 * 2 * 3 * 22.5 + 2 * 7 * 3


def test_an_update_is_three_forward_passes_where_all_trains():
    groups = [GroupTokens(4, [2, 1])]
    assert COST.update_flops(groups) == 3 * COST.forward_flops(groups)


def test_frozen_weights_get_no_gradients():
    """Adapters: products of the frozen layers and of the LM head are spared once."""
    groups = [GroupTokens(4, [2, 1])]
    lora = TextCost(layer_params=10, trained_params=1, num_layers=2, query_width=3, head_params=7, head_trains=False)
    assert COST.update_flops(groups) - lora.update_flops(groups) == 2 * 9 * 7 + 2 * 7 * 3


@pytest.mark.parametrize(
    "make",
    [text_family, qwen3_5_text_family, functools.partial(qwen3_5_text_family, experts=True)],
    ids=["dense", "hybrid", "experts"],
)
def test_a_model_is_counted_as_the_planner_does(make):
    family = make()
    model = family.build()
    plan = Plan(ModelSizes.from_family(family), prompt_tokens=40, completion_tokens=10)
    batch = MicroBatch(groups=2, completions=4, count=1, tokens=2 * (40 + 4 * 10), scored=2 * 4 * 10)
    cost = TextCost.of(family, model)
    groups = [GroupTokens(40, [10] * 4)] * 2
    wanted = flops.forward_flops(plan, batch) + flops.head_flops(plan, batch)
    assert cost.forward_flops(groups) == pytest.approx(wanted)
    model.requires_grad_(False)
    assert TextCost.of(family, model).trained_params == 0


def test_the_gated_delta_rule_is_counted_per_row():
    hybrid = dataclasses.replace(COST, rule_flops=5.0)
    groups = [GroupTokens(4, [2, 1])]
    assert hybrid.forward_flops(groups) == COST.forward_flops(groups) + 5 * 7
    assert hybrid.update_flops(groups) == 3 * hybrid.forward_flops(groups)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_of_known_boards(name, flops):
    assert peak_flops(name) == flops

"""Gated delta nets and experts in the planner: by hand, and against what a layer on a CPU saves."""

import dataclasses

import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5TextConfig

from longrl.models.delta_layers import PackedDeltaNet
from longrl.models.planning_sizes import DeltaSizes
from longrl.models.qwen3_5 import Qwen3_5Family
from longrl.packing.attention import PackedLayout
from longrl.planning import delta_formulas, flops, formulas, memory, shapes, vllm_formulas
from longrl.planning.inputs import ModelSizes, Plan, VLLMShare
from longrl.planning.micro_batches import micro_batch
from longrl.planning.run_plan import head_notes
from longrl.types import GroupSpan
from tests.planning.test_formulas import RUN, TINY

DELTA = DeltaSizes(num_layers=1, num_heads=4, num_key_heads=2, key_size=2, value_size=3, taps=4)  # C is 8 + 12
HYBRID = dataclasses.replace(TINY, delta_nets=DELTA, gated_attention=True)
PLAN = dataclasses.replace(RUN, sizes=HYBRID)


def changed(**options):
    return dataclasses.replace(PLAN, **options)


# ---- by hand: one layer that attends, and one with a gated delta net ----


def test_a_sequence_keeps_a_state_in_float32_and_three_rows():
    assert DELTA.state_bytes(2) == 4 * 4 * 2 * 3 + 3 * 20 * 2
    assert delta_formulas.state_memory(PLAN, 5) == 5 * (96 + 3 * 20 * 4)
    assert delta_formulas.state_memory(RUN, 5) == 0


def test_keys_are_those_of_one_layer_and_completions_have_states():
    assert formulas.kv_cache(PLAN) == formulas.kv_cache(RUN) / 2 + 2 * 4 * (96 + 240)


def test_the_rule_costs_the_same_for_every_row():
    assert DELTA.rule_flops(64) == 4 * (64 * (5 * 2 + 3 * 3) + 6 * 2 * 3)
    batch = micro_batch(PLAN)
    pairs = 100**2 + 4 * (2 * 100 * 10 + 10**2)
    assert flops.forward_flops(PLAN, batch) == 2 * 200 * 140 + 2 * 8 * pairs + 140 * DELTA.rule_flops()
    assert flops.prefill_flops(PLAN) == 2 * 200 * 100 + 2 * 8 * 100**2 + 100 * DELTA.rule_flops()
    less = flops.decode_flops(RUN) - flops.decode_flops(PLAN)
    assert less == 4 * 8 * (1000 + 50) - 10 * DELTA.rule_flops(1)


def test_saved_tensors_by_hand():
    cuda = changed(cuda=True, gathered_bytes=2)
    of_net = 10 * (2 * 20 + 2 * 8 + 12 + 256) * 2 + 10 * 12 * (16 + 6)
    assert delta_formulas.saved_memory(cuda, 10) == of_net
    attends, net = formulas.layer_saved(cuda, 10), formulas.layer_saved(cuda, 10, delta_net=True)
    assert net - of_net == attends - formulas.attention_saved(cuda, 10)
    assert formulas.layers_saved(cuda, 10) == attends + net
    # the gate beside the queries, and its product with the output
    assert formulas.attention_saved(PLAN, 10) - formulas.attention_saved(RUN, 10) == 10 * 2 * 8 * 4
    checkpointed = dataclasses.replace(cuda, gradient_checkpointing=True)
    assert formulas.layers_saved(checkpointed, 10) == 2 * 10 * 8 * 2
    assert formulas.layer_backward(checkpointed, 10) >= max(attends, net)


def test_ranks_have_all_rows_of_their_value_heads():
    plan = changed(sequence_parallel_size=2)  # two of four value heads, one of two key heads
    widths = delta_formulas.local_widths(plan, 10)
    assert (widths.rows, widths.channels, widths.keys, widths.values) == (20, 2 * 2 + 2 * 3, 4, 6)
    three = changed(sequence_parallel_size=4)  # of every key head two parts, one on each rank
    assert delta_formulas.local_widths(three, 10).values == 3


def test_value_heads_that_are_padding_are_told():
    (_, note) = head_notes(changed(sequence_parallel_size=3))
    assert note == "4 value heads of gated delta nets: 1 part(s) of 2 per rank; 2 of 6 are padding"
    assert len(head_notes(dataclasses.replace(RUN, sequence_parallel_size=3))) == 1


def test_vllm_keeps_states_beside_keys_of_one_layer():
    share = VLLMShare(device_bytes=4e9, gpu_memory_utilization=0.5, max_num_seqs=8)
    plan, dense = changed(vllm=share), dataclasses.replace(RUN, vllm=share)
    assert vllm_formulas.cache_per_token(plan) == vllm_formulas.cache_per_token(dense) / 2
    assert vllm_formulas.least_cache(plan) == vllm_formulas.least_cache(dense) / 2 + 96 + 240


def test_experts_are_read_and_computed_as_far_as_they_are_chosen():
    sizes = dataclasses.replace(TINY, num_experts=8, experts_per_token=2, expert_params=160, largest_expert_weight=900)
    assert sizes.used_params == 200 - 160 * 3 / 4
    assert sizes.touched_params(1) == 250 - 160 * 3 / 4
    assert sizes.touched_params(4) == sizes.touched_params(99) == 250
    plan = dataclasses.replace(RUN, sizes=sizes)
    assert flops.prefill_flops(RUN) - flops.prefill_flops(plan) == 2 * 120 * 100
    assert formulas.largest_weight(plan) == 900
    assert formulas.mlp_saved(plan, 10) - formulas.mlp_saved(RUN, 10) == 10 * 2 * 2 * 8 * 4


# ---- against a real layer ----


def saved_by(layer: torch.nn.Module, hidden: torch.Tensor, layout: PackedLayout | None) -> int:
    """Bytes that a forward pass keeps for its backward pass, without weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, layout=layout)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("spans", [None, (GroupSpan(0, 512, (128, 64, 320)),)], ids=["rows", "a group"])
@pytest.mark.parametrize(("keys", "values", "key_size", "value_size"), [(2, 4, 16, 32), (4, 8, 64, 16), (1, 6, 24, 40)])
def test_a_layer_saves_what_is_planned(keys, values, key_size, value_size, spans):
    config = Qwen3_5TextConfig(
        hidden_size=64, linear_num_key_heads=keys, linear_num_value_heads=values, linear_key_head_dim=key_size,
        linear_value_head_dim=value_size, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    layer = PackedDeltaNet(Qwen3_5GatedDeltaNet(config, 0))
    delta = DeltaSizes(
        num_layers=1, num_heads=values, num_key_heads=keys, key_size=key_size, value_size=value_size, taps=4
    )
    plan = Plan(dataclasses.replace(TINY, delta_nets=delta), cuda=False)
    found = saved_by(layer, torch.randn(1, 1024, 64, requires_grad=True), PackedLayout(spans) if spans else None)
    assert delta_formulas.saved_memory(plan, 1024) == pytest.approx(found - 1024 * 64 * 4, rel=0.02)


# ---- released models ----


def released(name: str) -> Plan:
    """900 frames on 8 GPUs that share a sequence, G = 8."""
    sizes = ModelSizes.from_family(shapes.find_config(Qwen3_5Family(name)))
    return Plan(
        sizes, devices=8, sequence_parallel_size=8, weight_bytes=2, gathered_bytes=2, gradient_checkpointing=True,
        media_tokens=64_000, prompt_tokens=64_512, spatial_patches=576, frames=900, max_tokens_per_micro_batch=20_000,
    )  # fmt: skip


def test_a_completion_of_the_9b_costs_a_state_of_2_mib_per_layer_and_its_prompt_a_quarter_of_the_keys():
    plan = released("Qwen/Qwen3.5-9B")
    assert (plan.sizes.num_delta_nets, plan.sizes.num_attending) == (24, 8)
    assert delta_formulas.state_memory(plan, 1) == 24 * ((2 << 20) + 3 * 8192 * 2)
    every_layer = dataclasses.replace(plan, sizes=dataclasses.replace(plan.sizes, delta_nets=None))
    keys = formulas.kv_cache(plan) - delta_formulas.state_memory(plan, plan.rank_completions)
    assert keys == formulas.kv_cache(every_layer) / 4


def test_the_35b_goes_through_3b_a_token():
    sizes = released("Qwen/Qwen3.5-35B-A3B").sizes
    assert 2.9e9 < sizes.used_params + sizes.vocabulary * sizes.hidden < 3.1e9
    assert sizes.mlp_width == 9 * 512


@pytest.mark.parametrize("name", ["Qwen3.5-9B", "Qwen3.5-27B", "Qwen3.5-35B-A3B"])
def test_every_phase_of_a_released_model_is_planned(name):
    found = memory.estimate_memory(released(f"Qwen/{name}"))
    assert set(found.phases) == {"encode", "rollout", "update", "validate"}
    assert all(value >= 0 for parts in found.phases.values() for value in parts.values())

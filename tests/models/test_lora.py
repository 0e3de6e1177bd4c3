"""Adapters against peft's own `PeftModel` on stock transformers models, and the policy that trains them."""

from __future__ import annotations

import pytest
import torch

from longrl.algorithms import Algorithm, token_mean
from longrl.engines.weight_stream import engine_weights
from longrl.models.lora import LoRASettings, add_adapters, is_adapter, merged_weights
from longrl.modules.initial_weights import build_from
from longrl.modules.policy import OptimizerSettings
from longrl.packing.pack import pack
from longrl.strategies.fsdp import ShardingOptions
from longrl.strategies.mr_sp import MRSPStrategy
from longrl.testing.plain_forward import stock_model
from longrl.types import Batch
from tests.distributed import run_distributed
from tests.modules.test_policy import (
    BUDGETS,
    batch_of,
    disturb_text,
    gradients_by_hand,
    policy_of,
    sampled,
    text_prompts,
    tokens_of,
    train,
    with_targets,
)
from tests.tiny import (
    assert_same_gradients,
    mixed_prompts,
    peft_model,
    qwen3_5_text_family,
    text_family,
    vl_family,
)

LORA = LoRASettings(rank=4, alpha=6)
KL = Algorithm(token_weights=token_mean, kl_coef=0.3)


def adapted_vl(**options):
    return vl_family(freeze_vision_encoder=True, lora=LORA, **options)


def built(family):
    """A policy's model with adapters that add something."""
    policy = policy_of(family)
    policy.configure_model()
    disturb_text(policy)
    return policy.model


def logp_of(family, model):
    prompts = text_prompts(family)
    (packed,) = pack(prompts, tokens_of(sampled(family, prompts)), 1 << 30)
    with torch.no_grad():
        return family.forward(model, packed, {}).logp


# ---- the model ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_adapters_change_nothing(dtype):
    family = text_family(lora=LORA, dtype=dtype)
    assert torch.equal(logp_of(family, build_from(family, None)), logp_of(family, family.build()))


def test_every_linear_layer_of_the_text_stack_has_adapters_and_nothing_else_trains():
    model = build_from(adapted_vl(), None)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {name.split(".lora_")[0].partition("language_model.layers.")[2] for name in trained}
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert layers == {f"{layer}.{name}" for layer in range(2) for name in names}
    assert trained == {name for name in model.state_dict() if is_adapter(name)}  # the encoder has a gate_proj, too


def test_gated_delta_nets_have_adapters_and_routed_experts_have_none():
    family = qwen3_5_text_family(experts=True, lora=LORA)
    model = build_from(family, None)
    found = {name.split(".lora_")[0] for name in model.state_dict() if is_adapter(name)}
    nets = {
        f"model.layers.0.linear_attn.{name}"
        for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    }
    assert nets == {name for name in found if name.startswith("model.layers.0.linear_attn.")}
    assert {f"model.layers.3.self_attn.{name}_proj" for name in "qkvo"} <= found
    shared = {name.rpartition("mlp.")[2] for name in found if ".mlp." in name}
    assert shared == {"shared_expert_gate", *(f"shared_expert.{name}_proj" for name in ("gate", "up", "down"))}


@pytest.mark.parametrize("experts", [False, True])
def test_exported_adapters_of_a_hybrid_model_load_in_plain_transformers_with_peft(experts, tmp_path):
    from peft import PeftModel

    family = qwen3_5_text_family(experts, lora=LORA)
    model = built(family)
    adapters = {name: value for name, value in model.state_dict().items() if is_adapter(name)}
    family.export_adapters(adapters, tmp_path, family.model_path)
    plain = stock_model(family.build(), family)  # the base has the weights of the seed
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    ids = torch.tensor([family.encode_response("Which one comes next?").tolist() * 3])
    with torch.no_grad():
        wanted = loaded(ids).logits
        hidden = family.hidden_states(
            model, torch.arange(ids.shape[1])[None, None], inputs_embeds=embeddings(model, ids)
        )
    torch.testing.assert_close(model.get_output_embeddings()(hidden), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, plain_logits(family, ids), atol=1e-3)  # adapters add something


def embeddings(model, ids):
    return model.get_input_embeddings()(ids)


def plain_logits(family, ids):
    with torch.no_grad():
        return stock_model(family.build(), family)(ids).logits


def test_targets_can_be_chosen():
    model = build_from(text_family(lora=LoRASettings(target_modules=("q_proj", "v_proj"))), None)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in model.state_dict() if is_adapter(name)}
    assert layers == {"q_proj", "v_proj"}


def test_the_seed_of_the_family_decides_the_adapters_and_no_other_random_number_moves():
    before = torch.get_rng_state()
    first, again = (build_from(text_family(lora=LORA), None).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = build_from(text_family(lora=LORA, init_seed=1), None).state_dict()
    name = next(name for name in first if "lora_A" in name)
    assert not torch.equal(first[name], other[name])


# ---- merged weights ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engines_are_handed_what_peft_merges(dtype):
    family = text_family(lora=LORA, dtype=dtype)
    assert_peft_merges(family, built(family))


def test_an_engine_that_cannot_see_small_changes_is_warned_of_once(caplog):
    from longrl.engines.weight_stream import _warn_of_rounding

    _warn_of_rounding.cache_clear()
    for dtype, times in (("float32", 0), ("bfloat16", 1)):
        family = text_family(lora=LORA, dtype=dtype)
        model = build_from(family, None)
        for _ in range(2):
            list(engine_weights(family, model))
        assert caplog.text.count(f"merged for the engine into weights in {dtype}") == times


def assert_peft_merges(family, model, found=None):
    wanted = peft_model(model, family).merge_and_unload().state_dict()
    found = dict(engine_weights(family, model)) if found is None else found
    assert list(found) == [name for name in wanted if family.engine_weight(name)]  # vLLM fuses neighbours
    for name, value in found.items():
        assert value.dtype == wanted[name].dtype
        assert torch.equal(value, wanted[name]), name


def shards_merged(compute_dtype):
    family = adapted_vl(dtype="bfloat16")
    seen = {}

    def before(policy):
        from tests.strategies.test_mr_sp import disturb_sharded

        disturb_sharded(policy)
        seen.update(engine_weights(family, policy.model))

    batch = Batch(with_targets(mixed_prompts(family)))
    strategy = MRSPStrategy(1, sharding=ShardingOptions(compute_dtype=compute_dtype))
    steps = train(policy_of(family), batch, before=before, strategy=strategy, devices=2)
    assert steps.metrics[0]["train/grad_norm"] > 0
    return seen, {grad.dtype for grad in steps.gradients[0].values()}


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
def test_shards_of_two_precisions_are_merged_as_peft_would(compute_dtype):
    """The base is bfloat16, adapters and their gradients float32."""
    family = adapted_vl(dtype="bfloat16")
    model = built(family)
    for found, dtypes in run_distributed(shards_merged, 2, compute_dtype):
        assert_peft_merges(family, model, found)
        assert dtypes == {torch.float32}


# ---- training ----


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_gradients_are_those_of_peft_whatever_the_micro_batches(budget):
    family = adapted_vl()
    policy = policy_of(family, algorithm=Algorithm(token_weights=token_mean), max_tokens_per_micro_batch=budget)
    policy.configure_model()
    disturb_text(policy)
    groups = sampled(family, mixed_prompts(family))
    loss, expected = gradients_by_hand(peft_model(policy.model, family), groups, weights="token_mean")
    seen = train(policy, batch_of(policy, groups))
    assert all(is_adapter(name) for name in expected)
    assert seen.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-4, abs=2e-6)
    assert_same_gradients(seen.gradients[0], expected, 1e-5)


def test_a_step_moves_adapters_alone_and_keeps_state_for_them_alone():
    family = text_family(lora=LORA, dtype="bfloat16")
    policy = policy_of(family, optimizer=OptimizerSettings(lr=1e-5))
    batch = batch_of(policy, sampled(family, text_prompts(family)))
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    seen = train(policy, batch)
    moved = {name for name, value in policy.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_B" in name}  # A's gradient is zero while B is
    change = policy.model.state_dict()[next(iter(moved))]
    assert change.dtype == torch.float32  # bfloat16 would round 1e-5 beside a weight of 0.02 away
    assert change.abs().max() == pytest.approx(1e-5, rel=1e-3)
    optimizer = policy.optimizers().optimizer
    assert {id(parameter) for parameter in optimizer.state} == {
        id(parameter) for name, parameter in policy.model.named_parameters() if is_adapter(name)
    }
    assert seen.steps == 1


# ---- the reference ----


def test_the_reference_is_the_policy_the_run_began_with_and_no_second_model():
    family = text_family(lora=LORA)
    policy = policy_of(family, algorithm=KL, optimizer=OptimizerSettings(lr=1e-2))
    batch = batch_of(policy, sampled(family, text_prompts(family)))
    train(policy, batch, batch, batch)
    assert policy.reference is policy.policy
    prompts = [group.prompt for group in batch.groups]
    completions = [group.completions for group in batch.groups]
    found = policy.reference_logp(prompts, completions, {})
    fresh = policy_of(text_family())
    fresh.configure_model()
    expected = fresh.score(fresh.policy, prompts, completions, {})
    assert torch.equal(found, expected)
    assert not torch.equal(policy.score(policy.policy, prompts, completions, {}), expected)


def test_the_reference_leaves_adapters_trainable():
    family = text_family(lora=LORA)
    policy = policy_of(family, algorithm=KL)
    seen = train(policy, batch_of(policy, sampled(family, text_prompts(family))))
    assert seen.metrics[0]["train/grad_norm"] > 0
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == set(seen.gradients[0])


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"lora\.rank must be at least 1, got 0"),
        ({"alpha": 0}, r"lora\.alpha must be above 0, got 0"),
        ({"dropout": 1.0}, r"lora\.dropout must be at least 0 and below 1, got 1\.0"),
        ({"target_modules": ()}, r"lora\.target_modules must name a layer, got none; leave it out"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoRASettings(**options)


@pytest.mark.parametrize(("name", "closest"), [("q_porj", "q_proj"), ("up", "up_proj"), ("qkv", "v_proj")])
def test_an_unknown_target_is_answered_with_the_closest(name, closest):
    family = text_family(lora=LoRASettings(target_modules=("v_proj", name)))
    with pytest.raises(ValueError, match=rf"target_modules must name linear.*got '{name}'; the closest is '{closest}'"):
        build_from(family, None)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "visual", "qkv"])
def test_tied_embeddings_and_the_tower_are_no_targets(name):
    family = vl_family(freeze_vision_encoder=True, lora=LoRASettings(target_modules=(name,)))
    with pytest.raises(ValueError, match="must name linear layers of the text stack"):
        build_from(family, None)


def test_a_tower_that_trains_is_refused():
    family = vl_family(lora=LORA)
    with pytest.raises(ValueError, match=r"freeze_vision_encoder is false; set it to true, or .*lora to null"):
        add_adapters(family, family.build())


def test_dropout_is_for_sft():
    family = text_family(lora=LoRASettings(dropout=0.1))
    seen = train(policy_of(family), Batch(with_targets(text_prompts(family))))
    assert seen.metrics[0]["train/grad_norm"] > 0
    policy = policy_of(family)
    batch = batch_of(policy, sampled(family, text_prompts(family)))
    with pytest.raises(ValueError, match=r"lora\.dropout must be 0 in RL, got 0\.1"):
        train(policy, batch)


def test_a_model_without_adapters_is_handed_over_as_it_is():
    state = text_family().build().state_dict()
    found = dict(merged_weights(state, None))
    assert all(found[name] is value for name, value in state.items())

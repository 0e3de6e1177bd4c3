"""Routers of a mixture: experts that the engine chose, replayed in the update, against a plain model with the same."""

import dataclasses
import math

import pytest
import torch

from longrl.algorithms import Algorithm
from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.features.trainable_features import TrainableFeatures
from longrl.models.expert_routing import expert_rows, gate_weights, watched_routers
from longrl.models.grouped_experts import experts_implementation
from longrl.models.lora import LoRASettings
from longrl.modules.expert_load import ExpertLoads, load_metrics
from longrl.modules.initial_weights import build_from
from longrl.packing.experts import with_experts
from longrl.packing.pack import pack
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import ExpertLoad, SamplingParams
from tests.families import FAMILIES
from tests.modules.test_policy import LENGTHS as LENGTHS_OF_POLICY, batch_of, policy_of, sampled, tokens_of, train
from tests.tiny import (
    answers_with_experts,
    assert_same_gradients,
    force_experts,
    gradients,
    mixed_prompts,
    plain_model,
    qwen3_vl_family,
    random_completions,
    row,
    separate_logps,
    text_family,
)

LENGTHS = [[3, 0, 1], [1, 3], [7, 3, 0]]


def scored(family, model, prompts, answers, max_tokens, coefficients):
    """(log-probabilities, load) by replay in micro-batches; leaves the gradient of their weighted sum on the model."""
    features = TrainableFeatures(family, model, prompts)
    logps = torch.zeros(len(coefficients))
    loads = []
    ids = [[answer.token_ids for answer in group] for group in answers]
    for packed in with_experts(pack(prompts, ids, max_tokens), answers):
        output = family.forward(model, packed, features.leaves)
        logps[packed.token_index] = output.logp.detach()
        (output.logp * coefficients[packed.token_index]).sum().backward()
        loads.append(output.load)
    features.backward()
    return logps, ExpertLoad(*(sum(parts) for parts in zip(*loads, strict=True)))


@pytest.mark.parametrize(
    ("max_tokens", "options"),
    [
        (10_000, {}),
        (250, {"gradient_checkpointing": True}),
        (10_000, {"gradient_checkpointing": True, "mlp_chunk_tokens": 7}),
    ],
    ids=["together", "split, recomputed", "pieces, recomputed"],
)
def test_replay_is_a_plain_model_that_is_made_to_use_the_experts(max_tokens, options):
    """Experts at random, so that no router would have chosen them; completions of 0, 1, 3 and 7 tokens."""
    family = qwen3_vl_family(experts=True, **options)
    model, prompts = build_from(family, None).train(), mixed_prompts(family)
    answers = answers_with_experts(prompts, random_completions(family, LENGTHS), shape=(3, 2), num_experts=4)
    plain = plain_model(model, family)
    force_experts(plain, prompts, answers)
    wanted = separate_logps(
        plain, prompts, [[answer.token_ids for answer in group if len(answer.token_ids)] for group in answers]
    )
    coefficients = torch.randn(len(wanted), generator=torch.Generator().manual_seed(1))
    (wanted * coefficients).sum().backward()
    found, load = scored(family, model, prompts, answers, max_tokens, coefficients)
    assert (found.double() - wanted).norm() <= 1e-5 * wanted.norm()
    assert_same_gradients(gradients(model), gradients(plain), 1e-5)
    assert load.differing / load.replayed > 0.2
    # without replay it is another function
    own = torch.cat(
        [
            family.forward(model, each, FeatureCache(family).get_or_encode(model, prompts)).logp
            for each in pack(prompts, random_completions(family, LENGTHS), 10_000)
        ]
    )
    assert (own - found).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "layers", "engine"),
    [
        ("qwen3-vl-moe", 3, HFEngine()),
        ("qwen3-vl-moe", 3, HFEngine(max_sequences=3, prefill_chunk_tokens=16)),
        ("qwen3.5-moe", 4, HFEngine(max_sequences=3, prefill_chunk_tokens=16)),
        ("qwen3-omni", 3, HFEngine()),
    ],
    ids=["once", "in parts", "states in parts", "with sound"],
)
def test_what_the_engine_chose_is_what_the_trainer_chooses(name, layers, engine):
    family = FAMILIES[name].make()
    family.router_replay = True
    model, prompts = family.build(), FAMILIES[name].prompts(family)
    features = FeatureCache(family).get_or_encode(model, prompts)
    sampling = SamplingParams(num_generations=3, max_completion_tokens=7)
    groups = engine.generate(family, model, prompts, features, sampling, seed=1)
    for prompt, group in zip(prompts, groups, strict=True):
        assert group[0].prompt_experts.shape == (len(prompt.input_ids), layers, 2)
        assert [answer.prompt_experts for answer in group[1:]] == [None, None]
        for answer in group:
            assert answer.experts.shape == (len(answer.token_ids) - 1, layers, 2)
            assert answer.experts.dtype == torch.int16
    ids = [[answer.token_ids for answer in group] for group in groups]
    (own,) = pack(prompts, ids, 10_000)
    (replayed,) = with_experts([own], groups)
    with torch.no_grad():
        plain = family.forward(model, own, features)
        again = family.forward(model, replayed, features)
    torch.testing.assert_close(again.logp, plain.logp, rtol=1e-6, atol=1e-6)
    sampler = torch.cat([answer.logprobs for group in groups for answer in group])
    torch.testing.assert_close(again.logp, sampler, rtol=1e-5, atol=1e-5)
    assert again.load.differing == 0
    num_rows = len(own.input_ids) - 9  # the last token of each completion was never read
    assert again.load.replayed == num_rows * layers * 2
    torch.testing.assert_close(again.load.tokens, plain.load.tokens, rtol=0, atol=0)
    assert plain.load.tokens.sum(1).tolist() == [2 * len(own.input_ids)] * layers


def test_a_moved_router_is_overruled_and_its_disagreement_counted():
    """Old log-probabilities stay those of the engine's experts, though the router would choose others now."""
    family = qwen3_vl_family(experts=True)
    family.router_replay = True
    model, prompts = family.build(), mixed_prompts(family)[2:]
    groups = HFEngine().generate(family, model, prompts, {}, SamplingParams(2, 5), seed=1)
    (packed,) = with_experts(
        pack(prompts, [[answer.token_ids for answer in group] for group in groups], 10_000), groups
    )
    with torch.no_grad():
        for router in watched_routers(family.layers(model)):
            router.weight += 0.3 * torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(4))
        load = family.forward(model, packed, {}).load
        free = family.forward(model, dataclasses.replace(packed, experts=None), {}).load
    assert 0.1 < load.differing / load.replayed < 1
    rows = torch.cat([groups[0][0].prompt_experts, *(answer.experts for answer in groups[0])])
    counted = torch.stack([torch.bincount(rows[:, layer].flatten().long(), minlength=4) for layer in range(3)])
    assert ((load.tokens - counted).sum(1) == 2 * len(groups[0])).all()  # the completions' last tokens are its own
    assert not torch.equal(load.tokens, free.tokens)


def test_the_policy_of_before_uses_the_engines_experts_and_the_reference_its_own(monkeypatch):
    """Two optimizer steps on a rollout, with a KL penalty; and a group that was sampled a step before."""
    family = qwen3_vl_family(experts=True, freeze_vision_encoder=True)
    prompts = mixed_prompts(family)
    groups = sampled(family, prompts)
    answers = answers_with_experts(prompts, tokens_of(groups), shape=(3, 2), num_experts=4)
    for group, experts in zip(groups, answers, strict=True):
        group.completions = experts
    groups[2].carried_over = True
    passes = []
    forward = type(family).forward

    def noted(self, model, packed, *args, **kwargs):
        passes.append((model is policy.model, torch.is_grad_enabled(), packed.experts is not None))
        return forward(self, model, packed, *args, **kwargs)

    monkeypatch.setattr(type(family), "forward", noted)
    policy = policy_of(family, algorithm=Algorithm(kl_coef=0.1), mini_batches_per_rollout=2)
    batch = batch_of(policy, groups)
    seen = train(policy, batch)
    assert passes == [(True, False, True), (False, False, False), (True, True, True), (True, True, True)]
    rows = sum(len(prompt.input_ids) for prompt in prompts) + sum(map(sum, LENGTHS_OF_POLICY))
    assert seen.metrics[0]["train/router_replayed"] == pytest.approx(1 - 9 / rows)
    assert 0 < seen.metrics[0]["train/router_mismatch"] < 1


def test_names_and_adapters_stay_what_they_were():
    for lora in (None, LoRASettings(rank=2)):
        family = qwen3_vl_family(experts=True, freeze_vision_encoder=True, lora=lora, mlp_chunk_tokens=5)
        model = build_from(family, None)
        names = list(model.state_dict())
        expert_rows(family, model, 3)
        assert list(model.state_dict()) == names


def test_routers_of_other_families_are_known():
    """Qwen3.5 and Qwen3-Omni have routers of their own classes, which weigh as these do."""
    from transformers import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
    from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeThinkerTextTopKRouter

    sizes = {"hidden_size": 16, "num_experts": 6, "num_experts_per_tok": 3}
    routers = [
        Qwen3_5MoeTopKRouter(Qwen3_5MoeTextConfig(**sizes)),
        Qwen3OmniMoeThinkerTextTopKRouter(Qwen3OmniMoeTextConfig(**sizes, norm_topk_prob=True)),
        Qwen3OmniMoeThinkerTextTopKRouter(Qwen3OmniMoeTextConfig(**sizes, norm_topk_prob=False)),
    ]
    for router in routers:
        layer = torch.nn.Module()
        layer.gate = router
        torch.nn.init.normal_(router.weight)
        assert watched_routers([layer]) == [router]
        logits, weights, experts = router(torch.randn(5, 16))
        torch.testing.assert_close(gate_weights(router, logits, experts), weights)


def test_grouped_products_are_one_expert_after_the_other():
    name, _ = experts_implementation()
    assert name == "grouped_mm"
    family = qwen3_vl_family(experts=True)
    model, prompts = family.build(), mixed_prompts(family)[2:]
    assert model.config.text_config._experts_implementation == name
    (packed,) = pack(prompts, random_completions(family, [[5, 3]]), 10_000)
    results = []
    for implementation in (name, "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        output = family.forward(model, packed, {})
        output.logp.sum().backward()
        results.append((output.logp.detach(), gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert_same_gradients(results[0][1], results[1][1], 1e-5)


def test_metrics_of_an_even_and_of_a_lopsided_load():
    nothing = torch.zeros((), dtype=torch.float64)
    even = load_metrics(ExpertLoad(torch.full((2, 4), 5.0, dtype=torch.float64), nothing, nothing))
    assert even["expert_max_violation"] == pytest.approx(0)
    assert even["expert_entropy"] == pytest.approx(1)
    assert even["experts_unused"] == 0
    assert even["router_replayed"] == 0
    assert math.isnan(even["router_mismatch"])
    tokens = torch.tensor([[8, 0, 0, 0], [4, 4, 0, 0]], dtype=torch.float64)
    loads = ExpertLoads()
    loads.add(None)
    assert loads.metrics(SINGLE_RANK) == {}
    loads.add(ExpertLoad(tokens / 2, nothing + 6, nothing + 3))
    loads.add(ExpertLoad(tokens * 9, nothing + 1, nothing), counts=False)
    loads.add(ExpertLoad(tokens / 2, nothing + 6, nothing))
    found = loads.metrics(SINGLE_RANK)
    assert found["expert_max_violation"] == pytest.approx((3 + 1) / 2)
    assert found["expert_entropy"] == pytest.approx((0 + 0.5) / 2)
    assert found["experts_unused"] == 5 / 8
    assert found["router_replayed"] == 12 / 16
    assert found["router_mismatch"] == 3 / 12


# ---- bad input ----


def test_experts_of_another_model_are_refused():
    family = qwen3_vl_family(experts=True)
    model = family.build()
    with pytest.raises(
        ValueError, match=r"experts of 2 layers, 5 for each token.* a model that has 3 x 2.*router_replay to false"
    ):
        expert_rows(family, model, 7, torch.zeros(7, 2, 5, dtype=torch.int16))
    dense = text_family()
    with pytest.raises(ValueError, match=r"a model that has 0"):
        expert_rows(dense, dense.build(), 7, torch.zeros(7, 2, 5, dtype=torch.int16))


def test_an_engine_without_routers_to_record_says_so():
    family = text_family()
    family.router_replay = True
    prompts = [family.render(row(), "Which one?")]
    with pytest.raises(ValueError, match=r"needs routers that longrl knows, and Qwen2ForCausalLM has none"):
        HFEngine().generate(family, family.build(), prompts, {}, SamplingParams(2, 3), seed=1)


def test_a_router_that_weighs_otherwise_is_refused():
    class Sigmoid(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.top_k, self.num_experts = 2, 4
            self.weight = torch.nn.Parameter(torch.randn(4, 8))

        def forward(self, hidden):
            logits = hidden @ self.weight.T
            weights, experts = logits.sigmoid().topk(2)
            return logits, weights, experts

    family = qwen3_vl_family(experts=True)
    model = family.build()
    for layer in family.layers(model):
        layer.mlp.gate = Sigmoid()
    with pytest.raises(ValueError, match=r"router_replay knows routers .* and Sigmoid weighs experts otherwise"):
        expert_rows(family, model, 7, torch.zeros(7, 3, 2, dtype=torch.int16))

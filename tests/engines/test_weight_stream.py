"""What an engine with a model of its own is handed: after any number of LoRA steps, and what it is not handed."""

import pytest
import torch

from longrl.engines.weight_stream import engine_weights
from longrl.models.lora import LoRASettings
from longrl.modules.initial_weights import build_from
from longrl.packing.pack import pack
from tests.modules.test_policy import sampled, text_prompts, tokens_of
from tests.tiny import (
    llama_family,
    omni_family,
    qwen3_omni_family,
    qwen3_vl_family,
    text_family,
    vila_family,
    vl_family,
)

FROM_CONFIG = {"inv_freq", "original_inv_freq", "positional_embedding", "position_ids"}
"""Buffers that every model computes from its config: frequencies and places."""


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.01)])
def test_the_gap_between_engine_and_trainer_does_not_grow_over_lora_steps(dtype, limit):
    family = text_family(lora=LoRASettings(rank=4, alpha=8), dtype=dtype)
    model, engine = build_from(family, None), text_family(dtype=dtype).build()
    prompts = text_prompts(family)
    (packed,) = pack(prompts, tokens_of(sampled(family, prompts)), 1 << 30)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    seen = []
    for _ in range(21):
        engine.load_state_dict(dict(engine_weights(family, model)))
        trainer_logp = family.forward(model, packed, {}).logp
        with torch.no_grad():
            engine_logp = text_family(dtype=dtype).forward(engine, packed, {}).logp
        seen.append(engine_logp)
        assert float((engine_logp - trainer_logp.detach()).abs().max()) < limit
        (-trainer_logp.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [float((logp - seen[0]).abs().mean()) for logp in (seen[1], seen[20])]
    assert moved[0] > 0.003
    assert moved[1] > 0.1


@pytest.mark.parametrize(
    "make",
    [text_family, llama_family, vl_family, qwen3_vl_family, omni_family, qwen3_omni_family, vila_family],
)
def test_buffers_that_stay_here_are_those_that_an_engine_computes_from_the_config(make):
    """Weights go over by `state_dict`, which leaves out buffers that are not persistent."""
    model = make().build()
    left_out = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    assert left_out
    assert {name.rpartition(".")[2] for name in left_out} <= FROM_CONFIG

"""The real vLLM on a CPU, handed merged weights, against a trainer with adapters."""

from __future__ import annotations

import itertools

import pytest
import torch

from longrl.features.cache import FeatureCache
from longrl.models.lora import LoRASettings, is_adapter
from longrl.modules.initial_weights import build_from
from longrl.packing.pack import pack

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from tests.engines.test_vllm import GREEDY, engine, family_of, gap, prompts_of  # noqa: E402


@pytest.mark.parametrize("kind", ["qwen2", "qwen2.5-vl"])
def test_the_engine_is_the_trainer_after_every_step(kind, tmp_path):
    """Embeddings are tied: vLLM gets them under both names, and no adapter touches them."""
    family = family_of(kind, tmp_path)
    family.lora, family.freeze_vision_encoder = LoRASettings(rank=4, alpha=8), True
    assert family.config.get_text_config().tie_word_embeddings
    model, vllm = build_from(family, None), engine()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(adapters, lr=0.02)
    prompts = prompts_of(family)
    features = FeatureCache(family).get_or_encode(model, prompts)
    seen = []
    try:
        for step in range(4):
            vllm.sync(family, model, step)
            found = vllm.generate(family, model, prompts, features, GREEDY, seed=0)
            assert gap(family, model, prompts, features, found) < 1e-4
            seen.append(torch.cat([c.logprobs for own in found for c in own]))
            (packed,) = pack(prompts, [[c.token_ids for c in own] for own in found], 1 << 30)
            family.forward(model, packed, features).logp.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        vllm.close()
    assert all((now - before).abs().max() > 0.01 for before, now in itertools.pairwise(seen))
    assert len(adapters) == sum(is_adapter(name) for name in model.state_dict())

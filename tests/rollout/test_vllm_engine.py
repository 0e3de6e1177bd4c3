"""The real vLLM on a CPU against the trainer's own engine and forward pass."""

from __future__ import annotations

import pytest
import torch

from longrl.modules.packing import pack
from longrl.rollout.engine import HFEngine
from longrl.rollout.features import FeatureCache
from longrl.types import SamplingParams
from tests.tiny import frames, mixed_prompts, row, text_family, vl_family

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from longrl.rollout.vllm_engine import VLLMEngine  # noqa: E402

GREEDY = SamplingParams(1, 24, temperature=0.0)


def engine() -> VLLMEngine:
    small = {"block_size": 32, "seed": 0}
    return VLLMEngine(max_model_len=2048, max_num_seqs=16, kv_cache_gib=0.0625, enforce_eager=True, options=small)


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "qwen2.5-vl"])
def started(request):
    family = vl_family(freeze_tower=False) if request.param == "qwen2.5-vl" else text_family(request.param)
    made = engine()
    made.start(family)
    yield family, made
    made.close()


def prompts_of(family):
    if not family.media_token_ids():
        return [family.render(row(str(i)), "Which one? " * (1 + 2 * i)) for i in range(3)]
    clips = [frames(40, key="long"), frames(5, 60, 90, key="v9")]
    long = family.render(row("long"), "What? <video> and <video>", clips)
    return [*mixed_prompts(family), long]  # 20 cells at 1.4 s: time counts further than the grid is wide


def trainer_logp(family, model, prompts, features, completions, temperature=1.0):
    (packed,) = pack(prompts, [[c.token_ids for c in own] for own in completions], 1 << 30)
    with torch.no_grad():
        return family.forward(model, packed, features, temperature).logp


def gap(family, model, prompts, features, completions, temperature=1.0) -> float:
    said = torch.cat([c.logprobs for own in completions for c in own])
    return float((said - trainer_logp(family, model, prompts, features, completions, temperature)).abs().max())


def test_the_engine_is_the_trainer_after_every_step(started):
    family, vllm = started
    model = family.build()
    prompts = prompts_of(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        features = FeatureCache(family).get_or_encode(model, prompts)
        vllm.sync(family, model, step)
        wanted = HFEngine().generate(family, model, prompts, features, GREEDY, seed=0)
        found = vllm.generate(family, model, prompts, features, GREEDY, seed=0)
        assert [[c.token_ids.tolist() for c in own] for own in found] == [
            [c.token_ids.tolist() for c in own] for own in wanted
        ]
        assert gap(family, model, prompts, features, found) < 1e-4
        (packed,) = pack(prompts, [[c.token_ids for c in own] for own in found], 1 << 30)
        family.forward(model, packed, features).logp.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

"""The stand-in for a rollout server's vLLM against the trainer."""

from __future__ import annotations

import asyncio

import pytest
import torch
import yaml

from longrl.engines.hf import HFEngine
from longrl.engines.server import VLLMServerEngine
from longrl.features.cache import FeatureCache
from longrl.packing.pack import pack
from longrl.testing.engine_servers import EngineServers
from longrl.testing.stand_in_engine import Pace, StandInEngine
from longrl.types import SamplingParams
from tests.engines.turn_checks import (
    SAMPLING,
    answers,
    crops,
    often_ending,
    outcome,
    turn_gap,
    with_sampled_placeholders,
)
from tests.runs import config, text_config
from tests.tiny import mixed_prompts, row, text_family, vl_family

pytest.importorskip("fastapi")


@pytest.mark.parametrize("make", [text_family, vl_family])
def test_a_stand_in_samples_as_the_trainer_scores(tmp_path, make):
    values = text_config(tmp_path) if make is text_family else config(min_pixels=784, max_pixels=3136)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    family = make()
    model = family.build()
    prompts = mixed_prompts(family) if family.media_token_ids() else [family.render(row("a"), "Which one?")]
    features = dict(FeatureCache(family).get_or_encode(model, prompts))
    with EngineServers([tmp_path / "config.yaml"], tmp_path / "weights", tmp_path / "log", in_fork=True) as servers:
        engine = VLLMServerEngine(servers.start(), weights_folder=str(tmp_path / "weights"))
        engine.sync(family, model, 0)
        greedy = SamplingParams(1, 8, temperature=0.0)
        wanted = HFEngine().generate(family, model, prompts, features, greedy, seed=0)
        found = engine.generate(family, model, prompts, features, greedy, seed=0)
        assert ids(found) == ids(wanted)

        found = engine.generate(family, model, prompts, features, SamplingParams(3, 8), seed=5)
        (packed,) = pack(prompts, [[c.token_ids for c in own] for own in found], 1 << 30)
        with torch.no_grad():
            scored = family.forward(model, packed, features).logp
        said = torch.cat([c.logprobs for own in found for c in own])
        torch.testing.assert_close(said, scored, atol=1e-5, rtol=0)
        part = engine.generate(family, model, prompts[:1], features, SamplingParams(2, 8), seed=5, first=1)
        assert ids(part) == [ids(found)[0][1:]]

        sampled = []
        for _ in range(2):
            groups = often_ending(family, prompts[:2])
            engine.generate_turns(family, model, groups, features, SAMPLING, 3, answers(family, model, features))
            assert turn_gap(family, model, groups, features) < 1e-5
            sampled.append(outcome(groups))
        assert sampled[0] == sampled[1]
        given = [[with_sampled_placeholders(family, prompt)] for prompt in prompts[:2]]
        once = answers(family, model, features, crops(family, count=lambda trajectory: 1))
        engine.generate_turns(family, model, given, features, SAMPLING, 3, once)
        assert turn_gap(family, model, given, features, given[0][0].turns[0].num_tokens) < 1e-5
        engine.close()


def ids(groups):
    return [[c.token_ids.tolist() for c in own] for own in groups]


def test_completions_that_are_cut_have_the_tokens_of_their_time():
    """3 at a time of 8 tokens, 50 ms each: cut after 150 ms those have about 3, and the one that waits none."""

    async def sample():
        engine = StandInEngine(text_family(), 64, 3, Pace(seconds_per_token=0.05))
        arguments = {"n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 8, "stop_token_ids": []}
        request = {"prompt_token_ids": [5, 6, 7]}

        async def ask(number):
            (output,) = [
                output
                async for output in engine.generate(request, arguments | {"seed": number % 4}, f"prompt-{number}")
            ]
            return output.outputs[0]

        whole = [ask(number) for number in range(4)]
        whole = await asyncio.gather(*whole)
        asked = [asyncio.ensure_future(ask(number)) for number in range(4, 8)]
        await asyncio.sleep(0.2)
        await engine.abort([f"prompt-{number}" for number in range(4, 8)])
        return whole, await asyncio.gather(*asked)

    whole, cut = asyncio.run(sample())
    assert [(len(one.token_ids), one.finish_reason) for one in whole] == [(8, "length")] * 4
    assert [one.finish_reason for one in cut] == ["abort"] * 4
    assert sum(0 < len(one.token_ids) < 8 for one in cut) == 3
    for one, other in zip(cut, whole, strict=True):
        assert one.token_ids == other.token_ids[: len(one.token_ids)]
        assert [list(at) for at in one.logprobs] == [[token] for token in one.token_ids]


def test_a_completion_keeps_its_pace_and_paces_have_a_tail():
    pace = Pace(0.01, tail=1.0)
    seconds = sorted(pace.seconds(f"prompt#{number}") for number in range(4000))
    assert pace.seconds("prompt#3") == pace.seconds("prompt#3")
    assert sum(seconds) / 4000 == pytest.approx(0.01, rel=0.1)
    assert seconds[3960] > 5 * seconds[2000]

"""Completions of several turns by `HFEngine`: exact, seeded whatever the tools' timing, and none waits for others."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from concurrent.futures import Future

import pytest
import torch

from longrl.engines import hf, turn_sampler
from longrl.engines.hf import HFEngine
from longrl.engines.turn_cache import TurnCache
from longrl.environments.trajectory import begin
from longrl.models.text import TextFamily
from longrl.packing.experts import with_experts
from longrl.packing.pack import pack
from longrl.testing.tiny import tiny_text
from longrl.types import SamplingParams
from tests.engines.test_hf import HostTraffic
from tests.families import FAMILIES
from tests.tiny import frames, qwen3_5_text_family, row, text_family
from tests.turns import every_nth_token, sample_turns, trainer_logprobs

SAMPLING = SamplingParams(num_generations=4, max_completion_tokens=24)


def crops(trajectory):
    """No answer, one, two or three, by the completion's number; two tools with media in the second."""
    number = trajectory.num_policy_turns - 1
    if number == trajectory.number % 4:
        return None
    name = f"{trajectory.prompt.id} {trajectory.number} {number}"
    if "text only" in trajectory.prompt.row.metadata:
        return [[f"It is {name}."], ["Or not. " * number]]
    crop = frames(3 + 2 * number, 60, 90, f"crop {name}")
    zoom = frames(1, 40, 70, f"zoom {name}", "image")
    return [["Here: ", crop], [zoom, " is it."]] if number == 1 else [[crop, f" of {name}"]]


def given(name, **options):
    family = FAMILIES[name].make(**options)
    prompts = FAMILIES[name].prompts(family)
    if not family.media_token_ids():
        prompts = [dataclasses.replace(one, row=row(one.id, metadata={"text only": True})) for one in prompts]
    return family, family.build(), prompts


def sample(given, engine=None, script=crops, sampling=SAMPLING, **options):
    family, model, prompts = given
    options.setdefault("stop_token_ids", every_nth_token(family, 5))
    return sample_turns(engine or HFEngine(), family, model, prompts, sampling, script, **options)


def flat(groups):
    return [completion for group in groups for completion in group]


def logprobs(groups):
    return torch.cat([completion.logprobs for completion in flat(groups)])


def assert_same_tokens(groups, others):
    for one, other in zip(flat(groups), flat(others), strict=True):
        assert torch.equal(one.token_ids, other.token_ids)


# -- exact ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2.5", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "qwen3-omni", "nvila"])
def test_logprobs_are_the_trainers_after_every_turn(name):
    family, model, prompts = case = given(name)
    groups, features = sample(case)
    wanted = trainer_logprobs(family, model, prompts, groups, features)
    torch.testing.assert_close(logprobs(groups), wanted, rtol=1e-5, atol=1e-5)
    num_turns = Counter(len(completion.turns) for completion in flat(groups))
    assert {1, 3, 5} <= num_turns.keys()  # no observation, one, two and mostly three
    for completion in flat(groups):
        assert completion.sampled is None or completion.num_sampled == len(completion.logprobs)
        sampled = completion.token_ids if completion.sampled is None else completion.token_ids[completion.sampled]
        turns = sampled.split([turn.num_tokens for turn in completion.turns if turn.role == "assistant"])
        assert [family.decode(ids) for ids in turns] == [t.text for t in completion.turns if t.role == "assistant"]
        assert completion.num_sampled <= 24
        assert (completion.finish_reason == "length") == (int(sampled[-1]) % 5 > 0)


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"top_k": 3, "temperature": 0.7}], ids=["greedy", "top-k"])
def test_of_the_distribution_that_is_drawn_from(change):
    family, model, prompts = case = given("qwen2.5-vl")
    sampling = dataclasses.replace(SAMPLING, **change)
    stops = every_nth_token(family, 1 if change["temperature"] == 0 else 5)  # the likeliest token may come for ever
    groups, features = sample(case, sampling=sampling, stop_token_ids=stops)
    assert max(len(completion.turns) for completion in flat(groups)) > 3
    if change["temperature"] == 0:
        wanted = trainer_logprobs(family, model, prompts, groups, features)
        torch.testing.assert_close(logprobs(groups), wanted, rtol=1e-5, atol=1e-5)
    else:  # of three tokens
        assert logprobs(groups).exp().mean() > 0.2


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3.5"])
def test_what_is_shown_is_read_in_chunks(name):
    """They end within prompts and within what is shown, and before a convolution has all rows that it sees."""
    case = given(name)
    wanted, _ = sample(case)
    found, _ = sample(case, HFEngine(prefill_chunk_tokens=23))
    assert_same_tokens(found, wanted)
    torch.testing.assert_close(logprobs(found), logprobs(wanted), rtol=1e-5, atol=1e-5)


def test_what_memory_held_before_is_read_by_nobody(monkeypatch):
    """Completions of very different lengths, in memory that is full of NaN."""
    new_empty = torch.Tensor.new_empty

    def full_of_nan(tensor, *args, **options):
        made = new_empty(tensor, *args, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", full_of_nan)
    groups, _ = sample(given("qwen2.5-vl"), sampling=SamplingParams(4, 96))
    assert len({len(completion.token_ids) for completion in flat(groups)}) > 4
    assert logprobs(groups).isfinite().all()


def test_completions_that_have_ended_leave_the_batch(monkeypatch):
    kept = []
    keep = TurnCache.keep

    def noted(cache, prompts, rows):
        kept.append((len(prompts), len(rows), len(cache._held)))
        keep(cache, prompts, rows)

    monkeypatch.setattr(TurnCache, "keep", noted)
    for name in ("qwen2.5-vl", "qwen3.5"):
        case = given(name)
        found, _ = sample(case)
        assert min(rows for _, rows, _ in kept) < 6
        assert max(held for *_, held in kept) > 0, "some wait meanwhile"
        monkeypatch.setattr(turn_sampler, "FULL_SHARE", 0.0)
        kept.clear()
        wanted, _ = sample(case)
        assert not kept
        monkeypatch.undo()
        monkeypatch.setattr(TurnCache, "keep", noted)
        assert_same_tokens(found, wanted)
        torch.testing.assert_close(logprobs(found), logprobs(wanted), rtol=1e-5, atol=1e-5)


def test_in_bfloat16_with_a_head_in_float32(tmp_path):
    family = TextFamily(str(tiny_text(tmp_path, tie_word_embeddings=False)), random_init=True)
    family.fp32_lm_head = True
    model = family.build()
    prompts = [family.render(row(str(i), metadata={"text only": True}), "Which one? " * (1 + i)) for i in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        groups, features = sample((family, model, prompts))
        wanted = trainer_logprobs(family, model, prompts, groups, features)
    assert (logprobs(groups) - wanted).abs().max() < 0.02


def test_the_trainer_uses_the_experts_of_all_turns():
    family, model, prompts = case = given("qwen3.5-moe")
    family.router_replay = True
    assert HFEngine.replays_turns
    groups, features = sample(case)
    for prompt, group in zip(prompts, groups, strict=True):
        assert group[0].prompt_experts.shape == (len(prompt.input_ids), 4, 2)
        assert [completion.prompt_experts for completion in group[1:]] == [None] * 3
        assert all(len(completion.experts) == len(completion.token_ids) - 1 for completion in group)
    (packed,) = with_experts(pack(prompts, groups, 1 << 30), groups)
    with torch.no_grad():
        scored = family.forward(model, packed, features)
    torch.testing.assert_close(scored.logp, logprobs(groups), rtol=1e-5, atol=1e-5)
    assert scored.load.differing == 0
    assert scored.load.replayed == (len(packed.input_ids) - 12) * 4 * 2


# -- seeded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 2])
def test_one_turn_is_what_generate_samples_to_the_bit(first):
    family, model, prompts = given("qwen2.5-vl")
    features = {}
    for prompt in prompts:
        for item in prompt.media:
            (features[item.key],) = family.encode_media(model, [item])
    with torch.no_grad():
        wanted = HFEngine().generate(family, model, prompts, features, SAMPLING, 3, first)
        groups = begin(prompts, SAMPLING, 3, first)
        HFEngine().generate_turns(family, model, groups, features, SAMPLING, 3, lambda trajectory: None)
    found = [[trajectory.completion() for trajectory in group] for group in groups]
    assert_same_tokens(found, wanted)
    assert torch.equal(logprobs(found), logprobs(wanted))
    for one, other in zip(flat(found), flat(wanted), strict=True):
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)


def test_how_long_tools_take_decides_nothing():
    case = given("qwen2.5-vl")
    wanted, _ = sample(case)
    for _ in range(2):
        found, _ = sample(case, delay=0.05)
        assert_same_tokens(found, wanted)
        assert torch.equal(logprobs(found), logprobs(wanted))


def test_draws_are_those_of_the_prompt_and_the_number_whatever_the_batch():
    family, model, prompts = given("qwen2.5-vl")
    wanted, _ = sample((family, model, prompts))
    found, _ = sample((family, model, prompts[::-1]), HFEngine(max_sequences=4, answer_after_tokens=1))
    assert_same_tokens(found[::-1], wanted)


# -- who waits for whom --------------------------------------------------------------------------------------------


def text_case(num_prompts=2):
    family = text_family()
    prompts = [family.render(row(str(i), metadata={"text only": True}), f"word {i}") for i in range(num_prompts)]
    return family, family.build(), prompts


def test_others_go_on_while_one_waits(monkeypatch):
    """An answer that comes only after the others' next steps: with a barrier it would never come."""
    family, model, prompts = text_case(1)
    steps = []
    has_gone_on = threading.Event()
    decode = turn_sampler.TurnSampler._decode

    def noted(sampler):
        decode(sampler)
        steps.append(len(sampler._sampling))
        if len(steps) == 16:
            has_gone_on.set()

    monkeypatch.setattr(turn_sampler.TurnSampler, "_decode", noted)
    sampling = SamplingParams(num_generations=2, max_completion_tokens=40)
    ((first, other),) = begin(prompts, sampling, max_turns=2)
    first.stop_token_ids = tuple(range(len(family.tokenizer)))  # its first token
    seen = []

    def answer(trajectory):
        future = Future()

        def late():
            assert has_gone_on.wait(60)
            seen.append(len(steps))
            future.set_result(family.observation([["Yes."]], ended=False))

        threading.Thread(target=late).start()
        return future

    HFEngine(answer_after_tokens=16).generate_turns(family, model, [[first, other]], {}, sampling, 1, answer)
    assert 16 <= seen[0] <= 24
    # The token that ended the turn was drawn at step 0, the answer is taken in at the first multiple of 8 from 17 on.
    assert steps == [1] * 24 + [1] * 15  # the second turn of the first one ends at once
    assert (other.num_sampled, first.num_sampled) == (40, 2)
    assert [turn.role for turn in first.turns] == ["assistant", "tool", "assistant"]


def test_an_answer_is_taken_in_at_once_if_nobody_samples():
    case = text_case()
    family = case[0]
    at_once = tuple(range(len(family.tokenizer)))
    with HostTraffic():
        groups, _ = sample(case, HFEngine(answer_after_tokens=1000), stop_token_ids=at_once)
    assert [len(completion.turns) for completion in flat(groups)] == [1, 3, 5, 7] * 2
    assert {turn.num_tokens for completion in flat(groups) for turn in completion.turns if turn.role != "tool"} == {1}


def test_an_error_of_the_environment_ends_the_rollout_and_leaves_the_model_as_it_was():
    family, model, prompts = text_case()
    model.train()

    def broken(trajectory):
        raise RuntimeError("no such video")

    with pytest.raises(RuntimeError, match="no such video"):
        sample((family, model, prompts), script=broken)
    assert model.training


# -- cost ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [text_family, qwen3_5_text_family])
def test_a_token_waits_for_the_device_once(make):
    """For what was drawn; copies from the host are made where turns end, whatever the number of layers and tokens."""
    family = make()
    model = family.build()
    prompts = [family.render(row(str(i)), text) for i, text in enumerate(["one two", "three"])]
    counts = []
    for length in (3, 9):
        sampling = SamplingParams(num_generations=2, max_completion_tokens=length)
        for _ in range(2):  # indices that all calls share are made once
            groups = begin(prompts, sampling, max_turns=1)
            with HostTraffic() as counted:
                HFEngine().generate_turns(family, model, groups, {}, sampling, 1, lambda trajectory: None)
        counts.append(+counted.counts)
    assert counts[0] == counts[1]


def test_room_grows_with_what_is_shown_and_not_beyond(monkeypatch):
    rooms = []
    resume = TurnCache.resume

    def noted(cache, row):
        rooms.append((cache.max_tokens, max(cache.lengths)))
        resume(cache, row)

    monkeypatch.setattr(TurnCache, "resume", noted)
    sample(text_case(), max_observed_tokens=300)
    assert rooms == sorted(rooms, key=lambda room: room[0])
    assert 24 < rooms[0][0] <= 24 + 300
    assert all(held <= room <= 24 + 300 for room, held in rooms)


def test_what_may_be_shown_counts_among_what_is_held(monkeypatch):
    lengths = []
    monkeypatch.setattr(hf.HFEngine, "_num_prompts", lambda *args: lengths.append(args[-1].max_completion_tokens) or 1)
    sample(text_case(), max_observed_tokens=100)
    assert lengths == [124] * 2

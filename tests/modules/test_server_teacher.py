"""A teacher behind a server says what its model says when it is here, and is asked again where a server is lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from longrl.algorithms.distillation import Distillation
from longrl.commands.serve import ServerOptions
from longrl.engines import server_pool
from longrl.engines.server import VLLMServerEngine
from longrl.engines.server_pool import ServersLost
from longrl.engines.server_scores import ServerScores, check_score_message
from longrl.modules.local_teacher import LocalTeacher
from longrl.modules.server_teacher import ServerTeacher, encoder_of, scored_request
from longrl.modules.teachers import TeacherRun
from longrl.packing.pack import continuations
from longrl.strategies.parallel import Parallel
from longrl.testing.engine_servers import EngineServers
from longrl.types import Batch, Continuation
from tests.modules.test_policy import policy_of, sampled, text_prompts, train
from tests.tiny import (
    mixed_prompts,
    plain_model,
    random_completions,
    separate_logps,
    text_family,
    vila_family,
    vl_family,
    vl_folder,
)

LENGTHS = ((5, 3), (4, 6), (2, 7))


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    options = {"model": vl_folder(), "random_init": True, "min_pixels": 28 * 28, "max_pixels": 56 * 56}
    family = {"class_path": "longrl.models.qwen_vl.Qwen2_5_VLFamily", "init_args": options}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"family": family}}))
    files = ([folder / "config.yaml"], folder / "weights", folder / "log")
    with EngineServers(*files, in_fork=True, weights="family", max_model_len=500) as started:
        yield started


@pytest.fixture
def asked(monkeypatch):
    """Makes teachers that are closed in the end."""
    monkeypatch.setattr(server_pool, "RETURN_S", 0.05)
    made = []

    def make(urls, distillation, family=None, **options):
        options = {"start_timeout_s": 60, "recover_timeout_s": 0, "retries": 0, **options}
        one = ServerTeacher(urls, family or vl_family(freeze_vision_encoder=True), **options)
        made.append(one)
        one.setup(vl_family(), distillation)
        one.start(TeacherRun(vl_family(), distillation, Parallel(), 1024, torch.device("cpu")))
        return one

    yield make
    for one in made:
        one.close()


def test_it_says_what_its_own_model_says_of_every_token(servers, asked):
    """The oracle is a stock transformers model that reads pixels, one forward pass per completion."""
    family = vl_family()
    prompts = mixed_prompts(family)
    completions = continuations(random_completions(family, LENGTHS))
    said = asked(servers.start(), Distillation("reverse_kl", top_k=5)).score(prompts, completions, temperature=1.0)
    plain = plain_model(family.build(), family).double()
    wanted = separate_logps(plain, prompts, completions)
    torch.testing.assert_close(said.logp.double(), wanted, atol=1e-5, rtol=1e-5)
    here = LocalTeacher(vl_family(freeze_vision_encoder=True))
    here.start(TeacherRun(vl_family(), Distillation("reverse_kl", top_k=5), Parallel(), 1024, torch.device("cpu")))
    same = here.score(prompts, completions, temperature=1.0)
    torch.testing.assert_close(said.logp, same.logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(said.top_logp.sort(1).values, same.top_logp.sort(1).values, atol=1e-5, rtol=1e-5)
    assert torch.equal(said.top_ids.sort(1).values, same.top_ids.sort(1).values)
    # The likeliest tokens: that of every sampled one among them, or less likely than all.
    assert said.top_ids.shape == said.top_logp.shape == (len(wanted), 5)
    assert all(len(set(ids)) == 5 for ids in said.top_ids.tolist())
    assert (said.top_logp.exp().sum(1) <= 1).all()
    sampled = torch.cat([one.token_ids for group in completions for one in group])
    for token, logp, ids, top in zip(sampled, said.logp, said.top_ids, said.top_logp, strict=True):
        assert logp in top[ids == token] if token in ids else (logp <= top).all()
    for index, token in enumerate(said.top_ids[0].tolist()):  # one of them asked about by itself
        other = [[Continuation(torch.tensor([token]))]]
        logp = separate_logps(plain, prompts[:1], other)
        torch.testing.assert_close(said.top_logp[0, index].double(), logp[0], atol=1e-5, rtol=1e-5)


def test_a_view_is_read_in_the_prompts_place_and_shown_tokens_are_not_scored(servers, asked):
    family = vl_family()
    video, text = mixed_prompts(family)[1:]
    seen = replace(text, teacher=video)
    whole = continuations(random_completions(family, ((6,),)))
    sampled = torch.tensor([True, True, False, False, True, True])
    shown = [[Continuation(whole[0][0].token_ids, sampled=sampled)]]
    plain = plain_model(family.build(), family).double()
    said = asked(servers.start(), Distillation("sampled")).score([seen], shown, temperature=1.0)
    torch.testing.assert_close(said.logp.double(), separate_logps(plain, [video], whole)[sampled], atol=1e-5, rtol=1e-5)
    assert said.top_ids is None
    assert said.num_passes == 1.0


def test_the_encoder_alone_is_kept_here():
    family = vl_family(freeze_vision_encoder=True)
    model = encoder_of(family, torch.device("cpu"))
    (encoder,) = family.media_encoders(model)
    kept = sum(weight.numel() for weight in model.parameters())
    assert kept == sum(weight.numel() for weight in encoder.parameters()) > 0
    media = mixed_prompts(family)[1].media
    wanted = family.encode_media(family.build(), media)
    assert torch.equal(family.encode_media(model, media)[0], wanted[0])


def test_what_a_lost_server_was_asked_is_asked_of_another(servers, asked):
    family = vl_family()
    prompts = mixed_prompts(family)
    completions = continuations(random_completions(family, LENGTHS))
    urls = [servers.start(), servers.start()]
    teacher = asked(urls, Distillation("sampled"))
    before = teacher.score(prompts, completions, temperature=1.0)
    servers.kill(urls[0])
    after = teacher.score(prompts, completions, temperature=1.0)
    torch.testing.assert_close(after.logp, before.logp, atol=1e-6, rtol=0)
    servers.kill(urls[1])
    with pytest.raises(ServersLost, match="no rollout server is left"):
        teacher.score(prompts, completions, temperature=1.0)


def test_nothing_is_asked_where_there_are_no_prompts_or_no_tokens(servers, asked):
    teacher = asked(servers.start(), Distillation("reverse_kl", top_k=3))
    said = teacher.score([], [], temperature=1.0)
    assert (len(said.logp), said.top_ids.shape, said.top_logp.shape) == (0, (0, 3), (0, 3))
    prompts = mixed_prompts(vl_family())[1:]
    answers = random_completions(vl_family(), ((3, 2), (1,)))
    none = torch.zeros(0, dtype=torch.int64)
    found = teacher.score([*prompts, prompts[0]], [[none, *answers[0]], [answers[1][0], none], [none]], temperature=1.0)
    wanted = teacher.score(prompts, answers, temperature=1.0)
    assert len(found.logp) == 6
    torch.testing.assert_close(found.logp, wanted.logp)
    assert torch.equal(found.top_ids, wanted.top_ids)


def test_what_no_server_can_score_is_refused(servers, asked):
    family = vl_family()
    prompts = mixed_prompts(family)[2:]
    long = [[Continuation(torch.ones(500, dtype=torch.int64))]]
    teacher = asked(servers.start(), Distillation("sampled"))
    with pytest.raises(ValueError, match=r"its server takes --max_model_len=500 with one behind them; raise that"):
        teacher.score(prompts, long, temperature=1.0)
    with pytest.raises(ValueError, match="at temperature 1, got 0.7"):
        teacher.score(prompts, [[]], temperature=0.7)
    vila = vila_family()
    prompt = mixed_prompts(vila)[1]
    features = {item.key: torch.zeros(vila.num_features(item), vila.feature_size) for item in prompt.media}
    with pytest.raises(ValueError, match="VilaFamily hands media to vLLM as embeddings"):
        scored_request(vila, prompt, Continuation(torch.tensor([5])), features)


@pytest.mark.parametrize(
    ("distillation", "message"),
    [
        (Distillation("reverse_kl"), "got top_k=None; set model.distillation.top_k"),
        (Distillation("reverse_kl", top_k=5000), "top_k must be at most 4096"),
        (Distillation("sampled", temperature=0.5), "set model.distillation.temperature to 1"),
    ],
)
def test_what_no_server_can_teach_is_refused_before_weights_are_loaded(distillation, message):
    with pytest.raises(ValueError, match=message):
        ServerTeacher("http://127.0.0.1:1", vl_family()).setup(vl_family(), distillation)


def test_a_policy_that_samples_at_another_temperature_is_refused_before_weights_are_loaded():
    family = text_family()
    teacher = ServerTeacher("http://127.0.0.1:1", text_family())
    policy = policy_of(family, teacher=teacher, distillation=Distillation("sampled"))
    policy.temperature = 0.7  # as the rollout callback says before
    with pytest.raises(ValueError, match=r"at temperature 1, got 0.7; set model\.distillation\.temperature to 1"):
        train(policy, Batch([], groups=sampled(family, text_prompts(family))))
    assert not policy.is_built
    teacher.setup(family, Distillation("sampled", temperature=1.0), temperature=0.7)


def test_a_server_of_another_model_or_of_a_trainers_weights_is_refused(servers, asked, tmp_path):
    with pytest.raises(ValueError, match="serves another model"):
        asked(servers.start(), Distillation("sampled"), family=text_family())
    options = {"model": vl_folder(), "random_init": True, "min_pixels": 28 * 28, "max_pixels": 56 * 56}
    family = {"class_path": "longrl.models.qwen_vl.Qwen2_5_VLFamily", "init_args": options}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"family": family}}))
    files = ([tmp_path / "config.yaml"], tmp_path / "weights", tmp_path / "log")
    wanted = pytest.raises(ValueError, match="start it by `python -m longrl serve --weights family`")
    with EngineServers(*files, in_fork=True) as others, wanted:
        asked(others.start(), Distillation("sampled"))


def test_a_server_of_its_own_weights_takes_no_others(servers):
    family = vl_family()
    engine = VLLMServerEngine(servers.start(), start_timeout_s=60, retries=0)
    with pytest.raises(ValueError, match="started with --weights family and takes no others"):
        engine.sync(family, family.build(), 0)
    engine.close()
    with pytest.raises(ValueError, match="set --lora to merged"):
        ServerOptions(weights="family", lora="adapters")


# ---- what vLLM says of prompts ----


class Cached:
    """VLLM's engine with a prefix cache: rows of cached tokens have no log-probabilities, or garbage."""

    def __init__(self, num_cached, whole_rows):
        self.num_cached = num_cached
        self.whole_rows = whole_rows
        self.asked = []

    async def generate(self, request, sampling, name):
        self.asked.append(sampling["skip_reading_prefix_cache"])
        ids = request["prompt_token_ids"]
        cached = 0 if sampling["skip_reading_prefix_cache"] else self.num_cached
        rows = [None]
        for index in range(1, len(ids)):
            logp = float("nan") if index <= cached else -index / 10
            rows.append({ids[index]: SimpleNamespace(logprob=logp), 99: SimpleNamespace(logprob=-0.01)})
        if not self.whole_rows:  # vLLM's second model runner leaves them out
            rows = [None, *rows[1 + cached :]]
        yield SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=rows, num_cached_tokens=cached)


def said_of(engine, completions, prompt=7):
    """What is said of the completions of one prompt of so many tokens."""
    requests = [{"prompt_token_ids": [*range(10, 10 + prompt), *tokens]} for tokens in completions]
    scores = ServerScores(engine, None, lambda params: params)
    return asyncio.run(scores.score(requests, [len(one) for one in completions], [len(completions)], top_k=1))


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize(
    ("num_cached", "asked", "read"), [(0, [False], 1.0), (6, [False], 1 / 7), (7, [False, True], 1.0)]
)
def test_a_cached_prompt_is_not_read_again_unless_the_cache_reaches_into_the_completion(
    num_cached, asked, read, whole_rows
):
    engine = Cached(num_cached, whole_rows)
    (said,) = said_of(engine, [[17, 18, 19]])
    assert said["logprobs"] == [-0.7, -0.8, -0.9]
    assert said["top_ids"] == [[99]] * 3
    assert engine.asked == asked
    assert said["read"] == pytest.approx(read)


@pytest.mark.parametrize("whole_rows", [False, True])
def test_rows_that_another_completion_has_brought_into_the_cache_are_that_ones(whole_rows):
    """The first request reads all; the second has 9 tokens in the cache, two of its completion, the third 8.

    The token behind those is the second's own: it is among the likeliest there. The third's is not, and is read again.
    """

    class Growing(Cached):
        async def generate(self, request, sampling, name):
            self.num_cached = {17: 0, 18: 9, 19: 8}[request["prompt_token_ids"][-1]]
            async for output in super().generate(request, sampling, name):
                yield output

    engine = Growing(0, whole_rows)
    first, second, third = said_of(engine, [[1, 2, 3, 17], [1, 2, 99, 18], [1, 5, 6, 19]])
    assert first["logprobs"] == third["logprobs"] == [-0.7, -0.8, -0.9, -1.0]
    assert second["logprobs"] == [-0.7, -0.8, -0.01, -1.0]
    assert engine.asked == [False, False, False, True]
    assert [first["read"], second["read"], third["read"]] == [1.0, 0.0, 1.0]


def test_a_prompt_without_log_probabilities_is_refused():
    class Nothing(Cached):
        async def generate(self, request, sampling, name):
            yield SimpleNamespace(prompt_token_ids=None, prompt_logprobs=None, num_cached_tokens=0)

    with pytest.raises(ValueError, match="of prompts with embeddings it has none"):
        asyncio.run(ServerScores(Nothing(0, True), None, dict).score([{}], [3], [1], top_k=1))


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": -1},
        {"top_k": 1 << 20},
        {"counts": [0]},
        {"counts": [True]},
        {"groups": [2]},
        {"tensors": ["x"]},
        {"more": 1},
    ],
)
def test_messages_that_mean_nothing_are_refused(change):
    message = {"version": "own", "requests": "[]", "tensors": [], "counts": [3], "groups": [1], "top_k": 4}
    check_score_message(message)
    with pytest.raises(ValueError, match="message"):
        check_score_message(message | change)

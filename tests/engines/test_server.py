"""A real vLLM server on a CPU against the trainer and the engine in the trainer's process."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from longrl.commands import serve
from longrl.engines.hf import HFEngine
from longrl.engines.server import VLLMServerEngine
from longrl.engines.vllm_extension import write_shards
from longrl.engines.vllm_turns import turn_arguments, turn_request
from longrl.environments.trajectory import begin
from longrl.features.cache import FeatureCache
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.packing.pack import pack
from longrl.testing.tiny import tiny_qwen2_5_vl
from longrl.types import Completion, SamplingParams
from tests.engines.turn_checks import (
    SAMPLING,
    answers,
    crops,
    often_ending,
    outcome,
    turn_gap,
    with_sampled_placeholders,
)
from tests.runs import config
from tests.servers import RunningServer
from tests.tiny import frames, row

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

from tests.engines.test_vllm import GREEDY, engine, gap, prompts_of  # noqa: E402

KEY = "a key of the test"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_qwen2_5_vl(tmp_path_factory.mktemp("model"), text={"hidden_size": 192})


@pytest.fixture(scope="module")
def server(model_folder, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGRL_SERVER_KEY", KEY)
        values = config("rl", freeze_vision_encoder=False, model=str(model_folder))
        values["model"]["algorithm"] = {"fp32_lm_head": True}  # which the server asks its worker about
        running = RunningServer(tmp_path_factory.mktemp("server"), values, KEY, as_typed=True)
        yield running
        running.close()


def family_of(folder):
    family = Qwen2_5_VLFamily(
        str(folder), random_init=True, freeze_vision_encoder=False, min_pixels=28 * 28, max_pixels=56 * 56
    )
    family.fp32_lm_head = True
    return family


MADE = []
"""Engines of a test, each of which would give its own weights to a server that was started anew."""


def engine_of(server, **options):
    MADE.append(VLLMServerEngine(server.url, str(server.weights), **{"start_timeout_s": 600, **options}))
    return MADE[-1]


@pytest.fixture(autouse=True)
def closed():
    yield
    while MADE:
        MADE.pop().close()


@pytest.fixture(scope="module")
def remote(server):
    made = engine_of(server)
    MADE.remove(made)
    yield made
    made.close()


@pytest.fixture
def in_step(server, remote, model_folder):
    """Family, engine, model with features, and prompts; the server has its weights."""
    family = family_of(model_folder)
    model = family.build()
    prompts = prompts_of(family)
    features = FeatureCache(family).get_or_encode(model, prompts)
    remote.sync(family, model, 1000)
    return family, remote, model, prompts, features


def ids(answers):
    return [[c.token_ids.tolist() for c in own] for own in answers]


def test_the_server_is_the_trainer_after_every_step(server, remote, model_folder):
    """With a encoder that trains: features of the same videos change with every step."""
    family = family_of(model_folder)
    model = family.build()
    prompts = prompts_of(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        features = FeatureCache(family).get_or_encode(model, prompts)
        remote.sync(family, model, step)
        wanted = HFEngine().generate(family, model, prompts, features, GREEDY, seed=0)
        found = remote.generate(family, model, prompts, features, GREEDY, seed=0)
        assert ids(found) == ids(wanted)
        assert gap(family, model, prompts, features, found) < 1e-4
        (packed,) = pack(prompts, [[c.token_ids for c in own] for own in found], 1 << 30)
        family.forward(model, packed, features).logp.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    remote.close()
    assert not list(server.weights.iterdir())


def test_log_probabilities_are_those_of_the_distribution_that_was_sampled(in_step):
    family, remote, model, prompts, features = in_step
    found = remote.generate(family, model, prompts, features, SamplingParams(3, 6, temperature=0.7), seed=5)
    assert [len(own) for own in found] == [3] * len(prompts)
    assert gap(family, model, prompts, features, found, temperature=0.7) < 1e-4


def test_completions_are_those_of_the_engine_in_the_trainers_process(in_step):
    family, remote, model, prompts, features = in_step
    local = engine()
    local.sync(family, model, 0)
    try:
        for sampling in (SamplingParams(4, 8), SamplingParams(2, 8, temperature=0.8, top_p=0.9, top_k=50), GREEDY):
            wanted = local.generate(family, model, prompts, features, sampling, seed=7, first=1)
            found = remote.generate(family, model, prompts, features, sampling, seed=7, first=1)
            assert ids(found) == ids(wanted)
            for one, other in zip(found, wanted, strict=True):
                for mine, theirs in zip(one, other, strict=True):
                    torch.testing.assert_close(mine.logprobs, theirs.logprobs, atol=1e-5, rtol=0)
                    assert (mine.text, mine.finish_reason) == (theirs.text, theirs.finish_reason)
        sampled = []
        for each in (local, remote):
            groups = often_ending(family, prompts[:2])
            known = dict(features)
            each.generate_turns(family, model, groups, known, SAMPLING, 3, answers(family, model, known))
            sampled.append(outcome(groups))
        assert sampled[0] == sampled[1]
    finally:
        local.close()


def test_completions_depend_on_seed_and_number_alone(in_step):
    family, remote, model, prompts, features = in_step

    def sampled(chosen, seed, first=0, count=4):
        return ids(remote.generate(family, model, chosen, features, SamplingParams(count, 6), seed, first))

    whole = sampled(prompts, seed=5)
    assert sampled(prompts[:1], seed=5) == whole[:1]
    assert sampled(prompts, seed=5, first=1, count=2) == [own[1:3] for own in whole]
    assert sampled(prompts, seed=6) != whole


def test_two_at_once_get_what_one_gets_alone(in_step):
    family, remote, model, prompts, features = in_step

    def sampled(seed):
        return ids(remote.generate(family, model, prompts, features, SamplingParams(2, 6), seed))

    alone = [sampled(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(sampled, (1, 2))) == alone


def test_features_cross_once(in_step):
    family, remote, model, _, _ = in_step
    prompts = [family.render(row("once"), "What?", [frames(6, 60, 60, "crossing")])]
    features = FeatureCache(family).get_or_encode(model, prompts)
    received = []
    for seed in range(3):
        received.append(remote.client.get_info()["num_received"])
        remote.generate(family, model, prompts, features, SamplingParams(1, 2), seed)
    assert received[0] < received[1] == received[2] == remote.client.get_info()["num_received"]


def test_turns_are_the_trainers(in_step):
    """Crops, two tools in one turn; each tensor crosses once, and placeholders that were sampled stay tokens."""
    family, remote, model, prompts, features = in_step
    features = dict(features)
    received = []
    found = []
    for _ in range(2):
        groups = often_ending(family, prompts[:2])
        received.append(remote.client.get_info()["num_received"])
        remote.generate_turns(family, model, groups, features, SAMPLING, 3, answers(family, model, features))
        assert [[len(trajectory.turns) for trajectory in group] for group in groups] == [[1, 3, 5]] * 2
        assert turn_gap(family, model, groups, features) < 1e-4
        found.append(outcome(groups))
    assert found[0] == found[1]
    assert received[1] == remote.client.get_info()["num_received"]

    given = [[with_sampled_placeholders(family, prompt)] for prompt in prompts[:2]]
    once = answers(family, model, features, crops(family, count=lambda trajectory: 1))
    remote.generate_turns(family, model, given, features, SAMPLING, 3, once)
    assert turn_gap(family, model, given, features, given[0][0].turns[0].num_tokens) < 1e-4


def test_an_error_of_an_answer_ends_the_rollout(in_step):
    family, remote, model, prompts, features = in_step
    failing = answers(family, model, dict(features), crops(family, count=lambda trajectory: 1 // trajectory.number))
    with pytest.raises(ZeroDivisionError):
        remote.generate_turns(family, model, often_ending(family, prompts), features, SAMPLING, 3, failing)
    remote.generate(family, model, prompts, features, GREEDY, seed=0)


def test_weights_go_over_once_per_step(in_step):
    family, remote, model, _, _ = in_step
    count = remote.num_syncs
    remote.sync(family, model, 1000)
    assert remote.num_syncs == count
    remote.sync(family, model, 1001)
    assert remote.num_syncs == count + 1


def test_weights_go_over_in_files_of_bounded_size(in_step, server):
    family, _, model, prompts, features = in_step
    small = engine_of(server, shard_mib=1)
    small.sync(family, model, 0)
    found = small.generate(family, model, prompts, features, GREEDY, seed=0)
    assert gap(family, model, prompts, features, found) < 1e-4


def test_another_run_on_the_same_server_is_noticed(in_step, server):
    family, remote, model, prompts, features = in_step
    engine_of(server).sync(family, model, 1000)
    with pytest.raises(ConnectionError, match=r"the server holds weights '.*:1000', asked for '.*:1000'.*of its own"):
        remote.generate(family, model, prompts, features, GREEDY, seed=0)
    remote.sync(family, model, 1000)
    remote.generate(family, model, prompts, features, GREEDY, seed=0)


def test_a_prompt_too_long_for_the_server_is_named(in_step):
    family, remote, model, _, _ = in_step
    prompts = [family.render(row("endless"), "word " * 3000)]
    with pytest.raises(ValueError, match=r"prompt 'endless' has \d+ tokens.*above 2048, the --max_model_len of the"):
        remote.generate(family, model, prompts, {}, GREEDY, seed=0)


def test_what_vllm_refuses_comes_with_its_words(in_step):
    _, remote, _, _, _ = in_step
    with pytest.raises(ValueError, match=r"HTTP 400.*maximum context length|HTTP 400.*max_model_len|HTTP 400.*2048"):
        remote.client.generate(remote._version, [{"prompt_token_ids": [5] * 3000}], [{"n": 1, "max_tokens": 2}])
    with pytest.raises(ValueError, match=r"HTTP 400.*temperature"):
        remote.client.generate(remote._version, [{"prompt_token_ids": [5]}], [{"n": 1, "temperature": -1.0}])


def test_weights_are_read_from_below_the_servers_folder_alone(in_step, tmp_path):
    _, remote, _, _, _ = in_step
    with pytest.raises(ValueError, match=r"HTTP 403.*is not below .*--weights_folder"):
        remote.client.load_weights(str(tmp_path), "x")
    with pytest.raises(ValueError, match=r"HTTP 404.*finds no .*--weights_folder"):
        remote.client.load_weights(remote.client.get_info()["weights_folder"] + "/nothing", "x")


def test_weights_of_another_model_are_refused_and_the_server_keeps_its_own(in_step, server):
    family, remote, model, prompts, features = in_step
    broken = server.weights / "broken"
    write_shards([("model.nothing", torch.ones(2))], broken, 1 << 20)
    with pytest.raises(ValueError, match=r"HTTP 400: .*'model.nothing' is no weight of it"):
        remote.client.load_weights(str(broken), "broken")
    shutil.rmtree(broken)
    assert remote.client.get_info()["version"] == remote._version
    found = remote.generate(family, model, prompts, features, GREEDY, seed=0)
    assert gap(family, model, prompts, features, found) < 1e-4


def test_a_trainer_that_hangs_up_ends_its_rollouts(in_step, server):
    """Else the next weights would wait for completions that nobody reads."""
    family, remote, model, _, _ = in_step
    endless = {"n": 48, "max_tokens": 1900, "ignore_eos": True}  # three times what is decoded together
    with pytest.raises(TimeoutError, match=r"within timeout_s=0\.5; raise timeout_s"):
        engine_of(server, timeout_s=0.5).client.generate(remote._version, [{"prompt_token_ids": [7]}], [endless])
    started = time.monotonic()
    remote.sync(family, model, 1002)
    assert time.monotonic() - started < 10


def test_turns_that_are_cut_keep_their_tokens_and_others_go_on(in_step):
    """By any weights of the run; what comes after a cut is not cut, nor what another one asked."""
    family, remote, model, prompts, features = in_step
    prompt = next(prompt for prompt in prompts if prompt.media)
    sampling = SamplingParams(4, 1200)
    ((ended, beside, later, others),) = begin([prompt], sampling, max_turns=1)
    request = turn_request(family, ended, features)
    params = turn_arguments(family, ended, sampling, 5, 2048) | {"stop_token_ids": []}
    with remote.continuous_requests() as requests, remote.continuous_requests() as apart:
        apart.add(others, request, params)
        turn = cut_under_way(requests, (ended, beside), request, params)
        assert (turn["finish_reason"], turn["version"]) == ("cut", 1000)
        assert 0 < len(turn["token_ids"]) == len(turn["logprobs"]) < 1200
        requests.add(later, request, params | {"max_tokens": 5})
        ((_, short),) = requests.finished([])
        assert (len(short["token_ids"]), short["finish_reason"], short["version"]) == (5, "length", 1000)
        ((_, whole),) = apart.finished([])
        assert (len(whole["token_ids"]), whole["finish_reason"]) == (1200, "length")
    assert whole["token_ids"][: len(turn["token_ids"])] == turn["token_ids"]
    assert whole["token_ids"][:5] == short["token_ids"]
    part = Completion(torch.tensor(turn["token_ids"]), torch.tensor(turn["logprobs"]), "", "length")
    assert gap(family, model, [prompt], features, [[part]]) < 1e-4


def cut_under_way(requests, pair, request, params, attempts=20):
    """A long turn that was cut after another, shorter one had ended; on a busy machine it may end before the cut."""
    ended, beside = pair
    for _ in range(attempts):
        requests.add(ended, request, params)
        requests.add(beside, request, params | {"max_tokens": 20})
        found = []
        while not any(trajectory is beside for trajectory, _ in found):
            found += requests.finished([])
        found += cut(requests)
        (turn,) = (turn for trajectory, turn in found if trajectory is ended)
        if turn["finish_reason"] == "cut" and turn["token_ids"]:
            return turn
    pytest.fail(f"no turn was cut in {attempts} attempts")


def cut(requests):
    """The turns that are under way, as far as they have come."""
    deadline = time.monotonic() + 60
    found = []
    while requests.num_pending:
        requests.cut()
        found += requests.finished([time_limit(0.1)])
        assert time.monotonic() < deadline
    return found


def time_limit(seconds):
    """A future that is done by then."""
    ended = Future()
    threading.Timer(seconds, ended.set_result, [None]).start()
    return ended


def test_an_option_that_vllm_does_not_know_is_named(model_folder):
    options = serve.ServerOptions(max_model_len=64, options={"no_such": 1})
    with pytest.raises(ValueError, match="--options has 'no_such', which vllm's server does not know"):
        serve.server_arguments(family_of(model_folder), options, KEY)


def test_another_model_than_the_servers_is_refused(in_step, server, tmp_path):
    other = family_of(tiny_qwen2_5_vl(tmp_path, text={"hidden_size": 96}))
    with pytest.raises(ValueError, match="serves another model.*hidden_size is 192 instead of 96"):
        engine_of(server).start(other)


def test_a_server_with_a_key_wants_it(in_step, server, monkeypatch):
    family, *_ = in_step
    monkeypatch.setenv("LONGRL_SERVER_KEY", "another")
    with pytest.raises(PermissionError, match="HTTP 401.*LONGRL_SERVER_KEY"):
        engine_of(server).start(family)


def test_vllms_own_routes_are_there_but_not_those_of_developers(in_step, server):
    request = urllib.request.Request(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    assert json.load(urllib.request.urlopen(request))["data"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(urllib.request.Request(f"{server.url}/collective_rpc", b"{}", request.headers))
    for route in ("v1/models", "metrics", "v1/longrl/info"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{server.url}/{route}")


def test_the_key_is_in_no_log(in_step, server):
    log = (server.folder / "log").read_text()
    assert "EngineCore" in log
    assert KEY not in log


def test_a_server_that_died_is_an_error_and_one_started_anew_gets_the_weights(in_step, server):
    family, other, model, prompts, features = in_step
    other.close()
    remote = engine_of(server, retries=1, recover_timeout_s=0)
    remote.sync(family, model, 5)
    wanted = ids(remote.generate(family, model, prompts, features, SamplingParams(2, 6), seed=5))
    server.kill()
    with pytest.raises(ConnectionError, match=r"cannot be reached, or died.*start the server again.*--ckpt_path"):
        remote.generate(family, model, prompts, features, GREEDY, seed=0)
    server.as_typed = False  # once is enough
    server.start()
    remote.client.wait_until_ready(180)
    remote.pool.recover_timeout_s = 60
    assert ids(remote.generate(family, model, prompts, features, SamplingParams(2, 6), seed=5)) == wanted
    assert (remote.num_syncs, remote.client.get_info()["version"]) == (1, remote._version)
    remote.close()

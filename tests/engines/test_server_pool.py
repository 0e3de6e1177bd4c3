"""Servers that come and go under a run, with the stand-in engine: what is sampled does not change."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
import yaml

from longrl.engines import server_pool
from longrl.engines.server import VLLMServerEngine
from longrl.engines.server_pool import ServersLost, lost_servers
from longrl.engines.vllm_turns import turn_arguments, turn_request
from longrl.environments.trajectory import begin
from longrl.io.network_loop import network_loop
from longrl.testing.engine_servers import EngineServers
from longrl.types import SamplingParams
from tests.distributed import run_distributed
from tests.runs import text_config
from tests.tiny import row, text_family

pytest.importorskip("fastapi")

SAMPLING = SamplingParams(2, 12)
SECONDS_PER_TOKEN = 0.05
"""A completion of 12 takes 0.6 s."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    (folder / "config.yaml").write_text(yaml.safe_dump(text_config(folder)))
    options = {"seconds_per_token": SECONDS_PER_TOKEN, "in_fork": True}
    with EngineServers([folder / "config.yaml"], folder / "weights", folder / "log", **options) as started:
        started.folder = folder
        started.urls = [started.start(), started.start()]
        yield started


@pytest.fixture(autouse=True)
def all_there(servers, monkeypatch):
    monkeypatch.setattr(server_pool, "RETURN_S", 0.05)
    yield
    for url in servers.urls:
        servers.kill(url)
        servers.start(url)


@pytest.fixture(scope="module")
def model():
    family = text_family()
    family.end_token_ids = (family.end_token_ids[0],)
    return family, family.build()


def prompts_of(family, count=6):
    return [family.render(row(f"prompt {number}"), f"Which of {number}?") for number in range(count)]


@contextmanager
def engine_at(servers, urls=None, **options):
    weights = str(servers.folder / "weights")
    with closing(VLLMServerEngine(urls or servers.urls, weights, **{"recover_timeout_s": 20.0, **options})) as engine:
        yield engine


def tokens(groups):
    return [[(c.token_ids.tolist(), c.logprobs.tolist()) for c in own] for own in groups]


def test_prompts_over_two_servers_are_those_of_one(servers, model):
    family, weights = model
    prompts = prompts_of(family)
    found = []
    for urls in (servers.urls[:1], servers.urls):
        with engine_at(servers, urls) as engine:
            engine.sync(family, weights, 0)
            found.append(tokens(engine.generate(family, weights, prompts, {}, SAMPLING, seed=3)))
            counted = [server.client.get_info()["num_running"] for server in engine.pool.servers]
            assert counted == [0] * len(urls)
    assert found[0] == found[1]


@pytest.mark.parametrize("how", ["rollout", "turns", "continuous"])
def test_what_a_lost_server_was_asked_is_asked_elsewhere_with_the_same_seeds(servers, model, how):
    family, weights = model
    prompts = prompts_of(family)
    with engine_at(servers) as engine:
        engine.sync(family, weights, 0)
        wanted = sample(engine, family, weights, prompts, how)
        assert engine.pool.num_repeated == 0
        threading.Timer(3 * SECONDS_PER_TOKEN, servers.kill, servers.urls[1:]).start()
        assert sample(engine, family, weights, prompts, how) == wanted
        assert (engine.pool.num_losses, engine.pool.num_repeated > 0) == (1, True)
        # It is given the weights in between, and is asked again.
        servers.start(servers.urls[1])
        wait_for(lambda: all(server.is_ready for server in engine.pool.servers))
        assert engine.num_syncs == 1
        assert sample(engine, family, weights, prompts, how) == wanted


def sample(engine, family, weights, prompts, how):
    if how == "rollout":
        return tokens(engine.generate(family, weights, prompts, {}, SAMPLING, seed=3))
    groups = begin(prompts, SAMPLING, max_turns=1)
    if how == "turns":
        engine.generate_turns(family, weights, groups, {}, SAMPLING, 3, None)
        return [one.completion().token_ids.tolist() for group in groups for one in group]  # batches round otherwise
    with engine.continuous_requests() as requests:
        every = [one for group in groups for one in group]
        for one in every:
            requests.add(one, turn_request(family, one, {}), turn_arguments(family, one, SAMPLING, 3, 2048))
        turns = {}
        while requests.num_pending:
            turns |= dict(requests.finished([]))
    assert {turn["version"] for turn in turns.values()} == {0}
    return [(turns[one]["token_ids"], turns[one]["finish_reason"]) for one in every]


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_any_server_a_rollout_waits_until_one_is_back(servers, model):
    family, weights = model
    prompts = prompts_of(family)
    with engine_at(servers) as engine:
        engine.sync(family, weights, 0)
        wanted = tokens(engine.generate(family, weights, prompts, {}, SAMPLING, seed=3))
        with ThreadPoolExecutor(1) as thread:
            for url in servers.urls:
                servers.kill(url)
            sampled = thread.submit(engine.generate, family, weights, prompts, {}, SAMPLING, 3)
            time.sleep(0.3)
            assert not sampled.done()
            servers.start(servers.urls[0])
            assert tokens(sampled.result()) == wanted
            servers.kill(servers.urls[0])
            engine.pool.recover_timeout_s = 0.3
            with pytest.raises(
                ServersLost, match=r"no rollout server is left for recover_timeout_s=0\.3 .*--ckpt_path"
            ):
                engine.generate(family, weights, prompts, {}, SAMPLING, 3)
            with pytest.raises(ServersLost):
                engine.sync(family, weights, 1)


def test_a_server_that_is_named_twice_is_told():
    with pytest.raises(ValueError, match=r"name each server once, got http://a:1 2 times"):
        VLLMServerEngine(["http://a:1", "http://b:1", "http://a:1/"])


def test_what_another_rank_says_of_lost_servers_is_understood():
    lost = ServersLost("no rollout server is left (u: gone)")
    assert lost_servers(lost) == "no rollout server is left (u: gone)"
    assert "u: gone" in lost_servers(RuntimeError(f"rank 1: {lost!r}"))
    assert lost_servers(RuntimeError("rank 1: ValueError('x')")) is None
    assert lost_servers(ConnectionError("u cannot be reached")) is None


def test_a_server_that_dies_while_it_loads_is_left_out(servers, model, monkeypatch):
    family, weights = model
    prompts = prompts_of(family)
    with engine_at(servers, retries=0) as engine:
        engine.sync(family, weights, 0)
        wanted = tokens(engine.generate(family, weights, prompts, {}, SAMPLING, seed=3))
        client = engine.clients[0]
        load = client.load_weights

        def die(*args):
            servers.kill(client.url)
            load(*args)

        monkeypatch.setattr(client, "load_weights", die)
        engine.sync(family, weights, 1)
        monkeypatch.undo()
        assert [server.is_ready for server in engine.pool.servers] == [False, True]
        assert tokens(engine.generate(family, weights, prompts, {}, SAMPLING, seed=3)) == wanted
        servers.start(client.url)
        engine.sync(family, weights, 2)
        assert [server.is_ready for server in engine.pool.servers] == [True, True]


@pytest.mark.parametrize("ends", ["is gone", "refuses"])
def test_what_is_cut_ends_also_where_its_server_is_gone(servers, model, ends):
    async def refuse(sender):
        raise ValueError("HTTP 404")

    family, weights = model
    ((one, other, third, fourth),) = begin(prompts_of(family, 1), SamplingParams(4, 200), max_turns=1)
    with engine_at(servers) as engine:
        engine.sync(family, weights, 0)
        with engine.continuous_requests() as requests:
            for trajectory in (one, other, third, fourth):
                request = turn_request(family, trajectory, {})
                params = turn_arguments(family, trajectory, trajectory.sampling, 3, 2048) | {"stop_token_ids": []}
                requests.add(trajectory, request, params)
            time.sleep(4 * SECONDS_PER_TOKEN)
            if ends == "is gone":
                servers.kill(servers.urls[1])
            else:
                for server in engine.pool.servers:
                    server.client.cut_async = refuse if server.under_way else server.client.cut_async
            ended = []
            while requests.num_pending:
                requests.cut()
                ended += requests.finished([])
    assert {turn["finish_reason"] for _, turn in ended} == {"cut"}
    assert {turn["version"] for _, turn in ended} == {0}
    assert all(len(turn["token_ids"]) == len(turn["logprobs"]) < 100 for _, turn in ended)


def test_a_server_that_hangs_is_found_out_and_one_that_is_hung_up_on_stops(servers, model, monkeypatch):
    family, weights = model
    monkeypatch.setattr(server_pool, "CHECK_S", 0.1)
    monkeypatch.setattr(server_pool, "CHECK_TIMEOUT_S", 0.5)
    prompts = prompts_of(family)
    with engine_at(servers) as engine:
        engine.sync(family, weights, 0)
        wanted = tokens(engine.generate(family, weights, prompts, {}, SAMPLING, seed=3))
        threading.Timer(2 * SECONDS_PER_TOKEN, servers.kill, (servers.urls[1], signal.SIGSTOP)).start()
        assert tokens(engine.generate(family, weights, prompts, {}, SAMPLING, seed=3)) == wanted
        assert engine.pool.num_losses == 1
        with engine.continuous_requests() as requests:
            ((endless,),) = begin(prompts[:1], SamplingParams(1, 1000), max_turns=1)
            params = turn_arguments(family, endless, endless.sampling, 3, 2048) | {"stop_token_ids": []}
            requests.add(endless, turn_request(family, endless, {}), params)
            wait_for(lambda: engine.client.get_info()["num_running"] == 1)
        wait_for(lambda: engine.client.get_info()["num_running"] == 0)


def test_servers_are_asked_while_weights_are_gathered_for_them(servers, model, monkeypatch):
    """The weights of before go on sampling until servers take over those of the sync."""
    family, weights = model
    ((one, other),) = begin(prompts_of(family, 1), SAMPLING, max_turns=1)
    with engine_at(servers, recover_timeout_s=0.0) as engine:
        engine.sync(family, weights, 0)
        send = engine._sender.send
        versions = []
        with engine.continuous_requests() as requests:

            def version_of(trajectory):
                request = turn_request(family, trajectory, {})
                requests.add(trajectory, request, turn_arguments(family, trajectory, SAMPLING, 3, 2048))
                ((_, turn),) = requests.finished([])
                return turn["version"]

            def send_meanwhile(*args):
                versions.append(version_of(one))
                return send(*args)

            monkeypatch.setattr(engine._sender, "send", send_meanwhile)
            engine.sync_beside(family, weights, 1, nullcontext)
            versions.append(version_of(other))
    assert versions == [0, 1]


def test_a_sync_and_a_cut_go_on_without_a_server_that_hangs(servers, model, monkeypatch):
    """Nobody looks after servers meanwhile, but who asks what they hold, and who has them cut."""
    family, weights = model
    monkeypatch.setattr(server_pool, "CHECK_TIMEOUT_S", 0.5)
    ((one,),) = begin(prompts_of(family, 1), SamplingParams(1, 1000), max_turns=1)
    with engine_at(servers) as engine:
        engine.sync(family, weights, 0)
        with engine.continuous_requests() as requests, ThreadPoolExecutor(1) as thread:
            params = turn_arguments(family, one, one.sampling, 3, 2048) | {"stop_token_ids": []}
            requests.add(one, turn_request(family, one, {}), params)
            wait_for(lambda: any(client.get_info()["num_running"] for client in engine.clients))
            (asked,) = [server for server in engine.pool.servers if server.under_way]
            network_loop().run(engine.pool.rest())
            servers.kill(asked.client.url, signal.SIGSTOP)
            try:
                requests.cut()
                wait_for(lambda: not asked.is_up)
                ((_, turn),) = requests.finished([])
                assert turn["finish_reason"] == "cut"
                asked.is_up = True  # as of another rank, which has not asked it for anything
                synced = thread.submit(engine.sync, family, weights, 1)
                wait_for(synced.done)
                assert not asked.is_up
                assert "hangs: no answer within 0.5 s" in asked.problem
            finally:
                servers.kill(asked.client.url)


def test_a_server_of_another_vllm_is_refused_by_ranks_that_had_not_lost_it(servers, model, monkeypatch):
    family, weights = model
    with engine_at(servers) as engine:
        engine.sync(family, weights, 0)
        info = engine.client.get_info()
        monkeypatch.setattr(engine, "_look", lambda world: {0: info, 1: info | {"vllm": "0.1"}})
        with pytest.raises(ValueError, match=r"runs vllm 0\.1"):
            engine.sync(family, weights, 1)


def rollouts_of_a_rank(urls, weights_folder, kills):
    """Of one of two ranks: before and after rank 0 has had a server killed."""
    rank = dist.get_rank()
    family = text_family()
    torch.manual_seed(0)
    model = family.build()
    prompts = prompts_of(family)[rank::2]
    with closing(VLLMServerEngine(urls, weights_folder, recover_timeout_s=20.0, retries=0)) as engine:
        found = []
        for step in range(3):
            if step == 1 and rank == 0:
                os.kill(kills, signal.SIGKILL)
            engine.sync(family, model, step)
            found.append(tokens(engine.generate(family, model, prompts, {}, SAMPLING, seed=3)))
            ready = [server.is_ready for server in engine.pool.servers]
        return found, ready, [server.under_way for server in engine.pool.servers]


def test_ranks_agree_on_the_servers_that_are_there(servers):
    ranks = run_distributed(
        rollouts_of_a_rank, 2, servers.urls, str(servers.folder / "weights"), servers.processes[servers.urls[1]]
    )
    for found, ready, under_way in ranks:
        assert found[0] == found[1] == found[2]
        assert (ready, under_way) == ([True, False], [0, 0])

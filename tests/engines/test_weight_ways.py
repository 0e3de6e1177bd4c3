"""Ways of weights to servers whose vLLM is a dict: what arrives by each is what was sent by files, tensor by tensor."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from longrl.strategies.fsdp import ShardingOptions, shard_policy
from tests.distributed import run_distributed

pytest.importorskip("vllm")

from longrl.engines.server_protocol import NO_VERSION, is_asked
from longrl.engines.weight_adapter_sender import send_adapters
from longrl.engines.weight_broadcast import BroadcastSender
from longrl.engines.weight_buckets import cut_buckets
from longrl.engines.weight_changed_sender import ChangedSender
from longrl.engines.weight_kept import mapped_shards
from longrl.engines.weight_senders import FileSender
from longrl.engines.weight_stream import WeightStream, engine_weights
from longrl.models.lora import LoRASettings
from longrl.modules.initial_weights import build_from
from tests.engines.weight_servers import StandInServer
from tests.tiny import text_family

WAYS = ("files", "changed", "broadcast")


def sender_of(way, folder, timeout_s=20.0):
    if way == "broadcast":
        sender = BroadcastSender("127.0.0.1", 0, 1, timeout_s)
        sender.bucket_bytes = 1 << 13  # several weights in some buckets, one alone in others
        return sender
    return (ChangedSender if way == "changed" else FileSender)(folder / "weights", 1)


def assert_holds(server, wanted):
    for held in server.held:
        torch.testing.assert_close(held, wanted, rtol=0, atol=0)


def train(model):
    """A step of which bfloat16 keeps a part: a weight in seven moves, and a bias altogether."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.view(-1)[::7] += 0.01
                if parameter.dim() == 1:
                    parameter += 0.5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_way_brings_what_files_bring(way, dtype, tmp_path):
    """With embeddings that are tied, adapters, a server of two workers beside one of one, and one that comes anew."""
    family = text_family(lora=LoRASettings(rank=4, alpha=8), dtype=dtype)
    model = build_from(family, None)
    servers = [StandInServer(family, tmp_path, 2), StandInServer(family, tmp_path)]
    sender = sender_of(way, tmp_path)
    stream = WeightStream(family, model)
    sizes = []
    for step in range(4):
        if step == 2:
            servers[1].routes.close()
            servers[1] = StandInServer(family, tmp_path)
        wanted = {name: weight.clone() for name, weight in engine_weights(family, model)}
        sizes.append(sender.send(stream, [server.client for server in servers], f"run:{step}", contextlib.nullcontext))
        for server in servers:
            assert_holds(server, wanted)
            assert server.routes.version == f"run:{step}"
            assert server.engine.calls[-1] == "resume"
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= wanted.keys()
        train(model)
    sender.close()
    for server in servers:
        server.routes.close()
    assert not list(tmp_path.glob("*/*"))
    whole = sum(weight.nbytes for weight in wanted.values())
    assert sizes[0] == whole
    if way == "changed":
        assert sizes[1] < 0.6 * whole
        assert whole < sizes[2] < 1.6 * whole  # the new server's are all
        assert sizes[3] < 0.6 * whole
    else:
        assert sizes == [whole] * 4


def from_shards(folder):
    """Whether this rank's server holds by each way what the whole model has."""
    family = text_family(lora=LoRASettings(rank=4, alpha=8))
    wanted = dict(engine_weights(family, build_from(family, None)))
    model = build_from(family, None)
    shard_policy(family, model, init_device_mesh("cpu", (2,)), ShardingOptions())
    server = StandInServer(family, folder / str(torch.distributed.get_rank()), 2)
    server.routes.weights_folder = folder / "weights"  # which all share
    for way in WAYS:
        sender_of(way, folder).send(WeightStream(family, model), [server.client], way, contextlib.nullcontext)
        assert_holds(server, wanted)
        for worker in server.engine.workers:
            worker.held = {}
    server.routes.close()


def test_two_ranks_with_shards_and_a_server_each(tmp_path):
    run_distributed(from_shards, 2, tmp_path)


# ---- what goes wrong ----


class Failing(WeightStream):
    """Weights of which the fifth cannot be gathered."""

    def __iter__(self):
        for number, pair in enumerate(super().__iter__()):
            if number == 5:
                raise MemoryError("no room to gather")
            yield pair


@pytest.fixture
def sent(tmp_path):
    """A stream, two servers that hold its weights by a broadcast, and the sender; a message may take 3 s."""
    family = text_family()
    stream = WeightStream(family, family.build())
    servers = [StandInServer(family, tmp_path), StandInServer(family, tmp_path)]
    sender = sender_of("broadcast", tmp_path, timeout_s=3.0)
    sender.send(stream, [server.client for server in servers], "run:0", contextlib.nullcontext)
    yield stream, servers, sender
    sender.close()


def send(sender, stream, servers, version):
    sender.send(stream, [server.client for server in servers], version, contextlib.nullcontext)


def assert_goes_on(stream, servers, sender):
    send(sender, stream, servers, "run:9")
    for server in servers:
        assert server.routes.version == "run:9"
        assert_holds(server, dict(stream))


def test_a_group_is_kept_while_its_servers_are_the_same(sent):
    stream, servers, sender = sent
    group = servers[0].routes.info()["weight_group"]
    send(sender, stream, servers, "run:1")
    assert [server.routes.info()["weight_group"] for server in servers] == [group] * 2
    send(sender, stream, servers[:1], "run:2")
    assert servers[0].routes.info()["weight_group"] != group


def test_a_trainer_that_cannot_gather_lets_the_servers_go(sent):
    stream, servers, sender = sent
    start = time.monotonic()
    with pytest.raises(MemoryError, match="no room to gather"):
        send(sender, Failing(stream.family, stream.model), servers, "run:1")
    assert time.monotonic() - start < 20
    for server in servers:
        assert server.routes.version == "none"
        assert server.engine.calls[-1] == "resume"
    assert_goes_on(stream, servers, sender)


def dies(group, buckets):
    """A worker whose process ends in the middle: its connections close."""
    group.broadcast(torch.empty(sum(each.room for each in next(iter(buckets))), dtype=torch.uint8))
    group.close()
    raise OSError("the worker is gone")


def hangs(until):
    def hang(group, buckets):
        until.wait(30)
        raise OSError("the worker is gone")

    return hang


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_server_that_is_lost_in_the_middle_does_not_hang_the_trainer(sent, how, monkeypatch):
    stream, servers, sender = sent
    is_over = threading.Event()
    broken = servers[1].engine.workers[0]
    monkeypatch.setattr(
        broken, "reload_weights", lambda weights_iterator: (dies if how == "dies" else hangs(is_over))(
            broken.longrl_group, sender_buckets(sender, stream))
    )  # fmt: skip
    with pytest.raises((ConnectionError, TimeoutError, RuntimeError)):
        send(sender, stream, servers, "run:1")
    is_over.set()
    assert servers[0].routes.version == "none"
    assert_goes_on(stream, servers[:1], sender)
    monkeypatch.undo()
    assert_goes_on_anew(stream, servers, sender)


def assert_goes_on_anew(stream, servers, sender):
    """Once the lost one is back, a new group is made with it."""
    send(sender, stream, servers, "run:10")
    for server in servers:
        assert_holds(server, dict(stream))


def sender_buckets(sender, stream):
    return cut_buckets(sender._announced(stream.family), sender.bucket_bytes)


def test_a_server_of_another_model_refuses_before_anything_is_sent(sent, tmp_path):
    stream, servers, sender = sent
    wider = text_family(dtype="float32")
    other = StandInServer(wider, tmp_path)
    other.routes.expected = {**other.routes.expected, "model.norm.weight": ((3,), torch.float32)}
    with pytest.raises(ValueError, match=r"'model.norm.weight' is \[\d+\] instead of \[3\].*with the same config"):
        send(sender, stream, [servers[0], other], "run:1")
    assert "pause" not in other.engine.calls
    assert_goes_on(stream, servers, sender)


def test_changes_of_other_weights_are_refused_and_all_are_sent_next(tmp_path):
    """What is kept was damaged: a checksum says so, and nothing of it is loaded."""
    family = text_family()
    stream = WeightStream(family, family.build())
    server, sender = StandInServer(family, tmp_path), sender_of("changed", tmp_path)
    send(sender, stream, [server], "run:0")
    mapped_shards(server.routes.kept.folder)["model.norm.weight"][1] += 1
    stream.model.model.norm.weight.data[0] += 1  # the damaged place is not among the changes
    with pytest.raises(ValueError, match="'model.norm.weight' is not what the trainer has after its changes"):
        send(sender, stream, [server], "run:1")
    assert server.routes.version == "run:0"
    send(sender, stream, [server], "run:2")
    assert_holds(server, dict(stream))
    server.routes.close()


@pytest.mark.parametrize("way", WAYS)
def test_adapters_go_beside_weights_that_go_once(way, tmp_path):
    family = text_family(lora=LoRASettings(rank=4, alpha=8))
    model = build_from(family, None)
    server, sender = StandInServer(family, tmp_path, takes_adapters=True), sender_of(way, tmp_path)
    stream = WeightStream(family, model, merge=False)
    sizes = []
    for step in range(3):
        version = f"run:{step}"
        sizes.append(send_adapters(sender, stream, [server.client], "run", version, contextlib.nullcontext))
        assert server.routes.version == version
        found = server.engine.adapters
        wanted = {name: value for name, value in model.state_dict().items() if ".lora_" in name}
        assert len(found) == len(wanted)
        for name, value in wanted.items():
            assert torch.equal(found[f"base_model.model.{name.replace('.default', '')}"], value)
        train(model)
    assert sizes[1] == sizes[2] == sum(value.nbytes for value in wanted.values())
    assert_holds(server, dict(engine_weights(family, model, merge=False)))
    plain = StandInServer(family, tmp_path)
    with pytest.raises(ValueError, match="start it with --lora adapters"):
        send_adapters(sender, stream, [plain.client], "run", "run:3", contextlib.nullcontext)
    sender.close()
    server.routes.close()


def test_a_pause_ends_with_the_adapters_of_the_weights_that_came(tmp_path):
    """Between the two a server would sample by weights that are of no step."""
    family = text_family(lora=LoRASettings(rank=4, alpha=8))
    servers = [StandInServer(family, tmp_path, takes_adapters=True) for _ in range(2)]
    found, depth = [], []

    @contextlib.contextmanager
    def pause():
        depth.append(None)
        yield
        depth.pop()
        if not depth:
            found.append([server.routes.version for server in servers])

    stream = WeightStream(family, build_from(family, None), merge=False)
    clients = [server.client for server in servers]
    for step in range(2):
        send_adapters(sender_of("files", tmp_path), stream, clients, "run", f"run:{step}", pause)
        servers[1].routes.version = servers[1].routes.base = NO_VERSION  # it was started anew
    assert found == [["run:0"] * 2, ["run:1"] * 2]
    versions = ("run:7", "run:base", NO_VERSION, "other:7")
    assert [is_asked(version, "run:*") for version in versions] == [True, False, False, False]
    for server in servers:
        server.routes.close()


def test_small_changes_are_rounded_away_in_merged_weights_and_arrive_in_adapters(tmp_path):
    family = text_family(lora=LoRASettings(rank=4, alpha=8), dtype="bfloat16")
    model = build_from(family, None)
    server = StandInServer(family, tmp_path, takes_adapters=True)
    for name, value in model.state_dict().items():
        if ".lora_B." in name:
            value += 1e-6
    plain, merged = (dict(engine_weights(family, model, merge=merge)) for merge in (False, True))
    changed = [float((plain[name] != merged[name]).float().mean()) for name in plain]
    assert 0 <= max(changed) < 0.05
    stream = WeightStream(family, model, merge=False)
    send_adapters(sender_of("files", tmp_path), stream, [server.client], "run", "run:0", contextlib.nullcontext)
    for name, matrix in server.engine.adapters.items():
        assert ".lora_A." in name or torch.equal(matrix, torch.full_like(matrix, 1e-6))
    server.routes.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [["model.norm.weight", [32], "float32"]]}, "is missing"),
        ({"weights": [["model.norm.weight", [32]]]}, "must be listed as"),
        ({"weights": [["../other", [1], "float32"]]}, "is no weight of it"),
        ({"first_rank": 0}, "first_rank and bucket_bytes"),
        ({"bucket_bytes": "1"}, "first_rank and bucket_bytes"),
        ({"group": {"host": "elsewhere"}}, "must have name, host"),
    ],
)
def test_an_order_of_a_broadcast_is_checked_before_a_server_connects(change, message, tmp_path):
    family = text_family()
    server, sender = StandInServer(family, tmp_path), sender_of("broadcast", tmp_path)
    address = {"name": "a", "host": "127.0.0.1", "port": 1, "size": 2, "backend": "gloo", "timeout_s": 1.0}
    listed = [each.as_json() for each in sender._announced(family)]
    order = {"version": "run:0", "group": address, "weights": listed, "bucket_bytes": 64, "first_rank": 1}
    with pytest.raises(ValueError, match=message):
        server.client.order_weights({**order, **change})
    assert server.engine.calls == []

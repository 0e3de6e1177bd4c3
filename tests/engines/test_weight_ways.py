"""Ways of weights to servers whose vLLM is a dict: what arrives by each is what was sent by files, tensor by tensor."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("vllm")

from longrl.engines.weight_broadcast import BroadcastSender
from longrl.engines.weight_changed_sender import ChangedSender
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

"""Two trainer ranks with shards, a real vLLM server for each: what it holds by every way, and adapters beside it."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from longrl.engines.server import VLLMServerEngine
from longrl.engines.weight_stream import WeightStream
from longrl.features.cache import FeatureCache
from longrl.models.lora import LoRASettings
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.modules.initial_weights import build_from
from longrl.strategies.fsdp import ShardingOptions, shard_policy
from longrl.testing.tiny import tiny_qwen2_5_vl
from tests.distributed import run_distributed
from tests.runs import config
from tests.servers import RunningServer

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """One as usual, one that takes adapters; weights pass through one folder."""
    folder = tmp_path_factory.mktemp("servers")
    model = tiny_qwen2_5_vl(folder / "model", text={"hidden_size": 192})
    values = config("rl", model=str(model), lora=LORA)
    shared = (f"--weights_folder={folder / 'weights'}", f"--kept_folder={folder / 'kept'}")
    with contextlib.ExitStack() as after:
        running = []
        for name, options in (("plain", ()), ("adapters", ("--lora=adapters",))):
            running.append(RunningServer(folder / name, values, options=(*shared, *options)))
            after.callback(running[-1].close)
        yield folder, [server.url for server in running]


def family_of(folder):
    sizes = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    return Qwen2_5_VLFamily(str(folder / "model"), random_init=True, lora=LoRASettings(**LORA), **sizes)


def adapted(family, seed):
    """The family's model whose adapters have been trained, so to speak: in one piece, and in shards of two ranks."""
    models = []
    for _ in range(2):
        model = build_from(family, None)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        models.append(model)
    shard_policy(family, models[1], init_device_mesh("cpu", (2,)), ShardingOptions())
    return models


def engine_of(folder, urls, way="files", **options):
    common = {"weights_folder": str(folder / "weights"), "start_timeout_s": 600, "transfer_timeout_s": 60}
    return VLLMServerEngine(urls, weight_transfer=way, **common, **options)


def sampled_gap(engine, family, model):
    from tests.engines.test_vllm import GREEDY, gap, prompts_of

    prompts = prompts_of(family)
    features = FeatureCache(family).get_or_encode(model, prompts)
    return gap(family, model, prompts, features, engine.generate(family, model, prompts, features, GREEDY, seed=0))


@dataclasses.dataclass(frozen=True)
class Failing(WeightStream):
    """Weights of which rank 0 cannot gather all."""

    def __iter__(self):
        for number, pair in enumerate(super().__iter__()):
            if number == 7 and torch.distributed.get_rank() == 0:
                raise MemoryError("no room to gather")
            yield pair


def every_way(folder, urls):
    """[(way, number of the weights, digests of this rank's server)], gaps after broadcasts, bytes of two ways."""
    family = family_of(folder)
    assert family.config.get_text_config().tie_word_embeddings
    policies = [adapted(family, seed) for seed in (1, 2)]
    engines = {way: engine_of(folder, urls, way) for way in ("files", "changed", "broadcast")}
    engines["broadcast"].bucket_mib = 1
    seen, gaps = [], []
    order = [("files", 0), ("broadcast", 1), ("changed", 0), ("broadcast", 0), ("changed", 1), ("files", 1)]
    for step, (way, number) in enumerate(order):
        whole, shards = policies[number]
        engines[way].sync(family, shards, step)
        seen.append((way, number, engines[way].client.weight_digests()))
        if way == "broadcast":
            gaps.append(sampled_gap(engines[way], family, whole))

    failing = Failing(family, policies[0][1])
    with pytest.raises((MemoryError, RuntimeError, ConnectionError), match="no room to gather"):
        engines["broadcast"]._sender.send(failing, [engines["broadcast"].client], "broken", contextlib.nullcontext)
    assert engines["broadcast"].client.get_info()["version"] == "none"
    engines["broadcast"].sync(family, policies[0][1], 9)
    seen.append(("broadcast", 0, engines["broadcast"].client.weight_digests()))
    for engine in engines.values():
        engine.close()
    return seen, gaps, engines["changed"].num_synced_bytes, engines["files"].num_synced_bytes


def test_servers_hold_the_same_by_every_way(servers):
    folder, urls = servers
    for seen, gaps, changed_bytes, file_bytes in run_distributed(every_way, 2, folder, urls):
        wanted = {0: seen[0][2], 1: seen[-2][2]}
        assert wanted[0] != wanted[1]
        assert len(wanted[0][0]) > 10
        for way, number, digests in seen:
            assert digests == wanted[number], (way, number)
        assert max(gaps) < 1e-4
        assert 0 < changed_bytes < file_bytes


def adapters_alone(folder, url, way):
    """(gap after each of two steps, bytes of each)."""
    family = family_of(folder)
    engine = engine_of(folder, url, way, lora="adapters")
    gaps, sizes = [], []
    for step in range(2):
        whole, shards = adapted(family, step)
        before = engine.num_synced_bytes
        engine.sync(family, shards, step)
        sizes.append(engine.num_synced_bytes - before)
        gaps.append(sampled_gap(engine, family, whole))
    engine.close()
    return gaps, sizes


def test_adapters_beside_the_weights_are_the_trainers(servers):
    folder, urls = servers
    for gaps, sizes in run_distributed(adapters_alone, 2, folder, urls[1], "broadcast"):
        assert max(gaps) < 1e-4
        assert sizes[1] < sizes[0] / 3  # the weights went over once

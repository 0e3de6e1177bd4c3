"""A real vLLM server of Qwen2.5-Omni on a CPU: its processes know the class that takes features of sound."""

import pytest
import torch

from longrl.engines.hf import HFEngine
from longrl.engines.server import VLLMServerEngine
from longrl.features.cache import FeatureCache
from longrl.models.qwen_omni import QwenOmniFamily
from longrl.packing.pack import pack
from longrl.testing.tiny import tiny_qwen_omni
from tests.runs import config
from tests.servers import RunningServer

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

from tests.engines.test_vllm import GREEDY, gap, prompts_of  # noqa: E402


def test_the_server_is_the_trainer_after_every_step(tmp_path):
    """Videos with longer and shorter tracks, an image, a sound alone, text; both encoders train."""
    folder = tiny_qwen_omni(tmp_path / "model", text={"hidden_size": 192})
    options = {"random_init": True, "freeze_vision_encoder": False, "freeze_audio_encoder": False}
    options |= {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    values = config("rl")
    described = {"class_path": "longrl.models.qwen_omni.QwenOmniFamily", "init_args": {"model": str(folder), **options}}
    values["model"]["family"] = described
    family = QwenOmniFamily(str(folder), **options)
    model, prompts = family.build(), prompts_of(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    server = RunningServer(tmp_path / "server", values)
    remote = VLLMServerEngine(server.url, weights_folder=str(server.weights), start_timeout_s=600)
    try:
        for step in range(2):
            features = FeatureCache(family).get_or_encode(model, prompts)
            remote.sync(family, model, step)
            wanted = HFEngine().generate(family, model, prompts, features, GREEDY, seed=0)
            found = remote.generate(family, model, prompts, features, GREEDY, seed=0)
            assert [c.token_ids.tolist() for own in found for c in own] == [
                c.token_ids.tolist() for own in wanted for c in own
            ]
            assert gap(family, model, prompts, features, found) < 1e-4
            (packed,) = pack(prompts, [[c.token_ids for c in own] for own in found], 1 << 30)
            family.forward(model, packed, features).logp.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        remote.close()
        server.close()

"""A real vLLM server that scores by its own weights says what a local teacher of the same weights says."""

from __future__ import annotations

import pytest
import torch

from longrl.algorithms.distillation import Distillation
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.modules.local_teacher import LocalTeacher
from longrl.modules.server_teacher import ServerTeacher
from longrl.modules.teachers import TeacherRun
from longrl.packing.pack import continuations
from longrl.strategies.parallel import Parallel
from longrl.testing.tiny import tiny_qwen2_5_vl
from tests.runs import config
from tests.servers import RunningServer
from tests.tiny import mixed_prompts, random_completions

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]
LENGTHS = ((5, 30), (40, 6), (2, 7))


def family_of(folder, **options) -> Qwen2_5_VLFamily:
    return Qwen2_5_VLFamily(str(folder), min_pixels=28 * 28, max_pixels=56 * 56, **options)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    random = family_of(tiny_qwen2_5_vl(folder / "sizes", text={"hidden_size": 192}), random_init=True)
    random.export(random.build(), folder / "model")
    values = config("rl", model=str(folder / "model"), random_init=False, max_pixels=56 * 56)
    running = RunningServer(folder / "server", values, options=("--weights=family",))
    running.model = folder / "model"
    yield running
    running.close()


@pytest.mark.parametrize("top_k", [None, 8])
def test_a_served_teacher_says_what_a_local_one_says(server, top_k):
    distillation = Distillation("reverse_kl", top_k=top_k) if top_k else Distillation("sampled")
    family = family_of(server.model)
    run = TeacherRun(family, distillation, Parallel(), 2048, torch.device("cpu"))
    prompts = mixed_prompts(family)
    completions = continuations(random_completions(family, LENGTHS))
    served = ServerTeacher(server.url, family_of(server.model), start_timeout_s=600)
    local = LocalTeacher(family_of(server.model))
    try:
        for teacher in (served, local):
            teacher.setup(family, distillation)
            teacher.start(run)
        # Once more: then prompts are in the cache, and completions too, which are scored without it.
        said = [served.score(prompts, completions, temperature=1.0) for _ in range(2)]
    finally:
        served.close()
    wanted = local.score(prompts, completions, temperature=1.0)
    for one in said:
        torch.testing.assert_close(one.logp, wanted.logp, atol=1e-3, rtol=1e-5)
        if top_k:
            torch.testing.assert_close(
                one.top_logp.sort(1).values, wanted.top_logp.sort(1).values, atol=1e-3, rtol=1e-5
            )
    assert said[0].num_passes < sum(map(len, LENGTHS))  # a group's prompt is read once where blocks of it are whole

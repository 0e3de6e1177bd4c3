"""The protocol against a real vLLM server: captions of frames, condensed timelines, a judge."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from longrl.chat.endpoint import Decoding, Endpoint
from longrl.commands.evaluate import parse_evaluation
from longrl.commands.pipeline import run_step
from longrl.evaluation.benchmark import Evaluation
from longrl.io.append_log import AppendLog
from longrl.io.jsonl import read_jsonl
from longrl.pipeline.config import CaptionOptions, SplitOptions, TimelineOptions
from longrl.pipeline.step_run import Workspace
from longrl.rewards import RewardSum, RewardTerm
from longrl.rewards.judge import Judge
from longrl.testing.tiny import tiny_qwen2_5_vl, tiny_text
from tests.evaluation import test_endpoint_policy as evaluation
from tests.pipeline.running import videos
from tests.pipeline.test_steps import captioned, config
from tests.rewards.test_judge import OPEN, group, tagged
from tests.runs import ROOT, wait_for_group

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]
START_S = 300


class Vllm:
    """`python -m vllm.entrypoints.openai.api_server` with random weights."""

    def __init__(self, folder, model) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}/v1", folder / "log"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", f"--port={port}"]
        sizes = ["--max-model-len=8192", "--max-num-seqs=8", "--block-size=32", "--kv-cache-memory-bytes=67108864"]
        plain = ["--load-format=dummy", "--dtype=float32", "--enforce-eager", "--served-model-name=tiny"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *sizes, *plain], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(self.url.replace("/v1", "/health"), timeout=2)
                return
            except OSError:
                time.sleep(0.5)

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        wait_for_group(self.process.pid)


@pytest.fixture(scope="module", params=["text", "vl"])
def vllm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    wide = {"hidden_size": 192}
    make = {"text": lambda: tiny_text(folder / "m", **wide), "vl": lambda: tiny_qwen2_5_vl(folder / "m", text=wide)}
    running = Vllm(folder, make[request.param]())
    running.sees = request.param == "vl"
    yield running
    running.close()


def endpoint(url: str) -> Endpoint:
    """Without seeds: vLLM 0.32 on a CPU dies of a seeded request whose prompt is prefilled in two parts."""
    return Endpoint("tiny", url, timeout_s=120.0, retries=2, concurrency=4, send_seed=False)


SHORT = Decoding(temperature=0.5, max_tokens=12)


def test_steps_ask_a_real_server_and_a_second_run_asks_nothing(vllm, tmp_path):
    roles = dict.fromkeys(("captioner", "writer"), endpoint(vllm.url))
    options = {"split": SplitOptions(clip_s=2.5, min_clip_s=1.0), "max_failed_share": 1.0}
    timeline = TimelineOptions(max_chars=1000, decoding=SHORT)
    made = config(tmp_path, **roles, **options, timeline=timeline, caption=CaptionOptions(frames=2, decoding=SHORT))
    made = type(made)(**{**vars(made), "videos": str(videos(1))})
    if vllm.sees:
        run_step(made, "split")
        report = run_step(made, "caption")
        assert report.done >= 1
        captions = Workspace(tmp_path).read("caption")
        assert any(clip["caption"] for clip in captions)
    else:
        captions = captioned(["word " * 40 for _ in range(12)])
        Workspace(tmp_path).write("caption", captions)
        report = run_step(made, "timeline")
        assert report.done >= 1
    step = report.step
    entries = [entry for entry in AppendLog(tmp_path / "responses").read() if entry["key"]]
    assert entries
    assert all(entry["prompt_tokens"] > 0 and 0 < entry["completion_tokens"] <= 12 for entry in entries)
    assert report.calls["calls"] == len(entries)
    assert run_step(made, step).calls["calls"] == 0


def test_an_evaluation_asks_a_real_server_and_a_second_one_asks_nothing(vllm, tmp_path):
    """The model that reads text alone is asked blind."""
    how = ["--frames=[2]", "--blind_baseline=true"] if vllm.sees else ["--data.blind=true"]
    options = {"send_seed": False, "concurrency": 4}
    how.append("--sampling.max_completion_tokens=12")
    args = evaluation.arguments(tmp_path, vllm.url, *how, model="tiny", **options)
    found = Evaluation(*parse_evaluation(args)).run().results
    lines = read_jsonl(tmp_path / "samples.jsonl")
    assert len(lines) == 8 * len(found["conditions"])
    assert all(line["error"] is None and 0 < line["num_completion_tokens"][0] <= 12 for line in lines)
    seen = [line["num_prompt_tokens"] for line in lines if line["num_frames"]]
    blind = [line["num_prompt_tokens"] for line in lines if not line["num_frames"]]
    assert len(blind) == 8
    assert all(more > less for more, less in zip(seen, blind, strict=vllm.sees))
    calls = len(list(AppendLog(next((tmp_path / "responses").iterdir())).read()))
    assert calls == len(lines)
    for path in (tmp_path / "answers").iterdir():
        path.unlink()
    assert Evaluation(*parse_evaluation(args)).run().results == found
    assert len(list(AppendLog(next((tmp_path / "responses").iterdir())).read())) == calls


def test_a_judge_without_sense_masks_and_does_not_score(vllm, tmp_path):
    judge = Judge(endpoint(vllm.url), str(tmp_path), decoding=Decoding(temperature=0.0, max_tokens=12))
    scored = group(OPEN, tagged("tea"), tagged("milk"), tagged("tea"))
    assert RewardSum([RewardTerm(judge, 1.0, "accuracy")]).score([scored]) == 3
    entries = list(AppendLog(tmp_path).read())
    assert len(entries) == 2 * 3  # two distinct answers, and a judge whose reply has no use is asked three times
    assert all("choices" in entry["response"] for entry in entries)
    assert scored.valid.tolist() == [False] * 3


def test_a_wrong_model_name_is_the_users_mistake(vllm, tmp_path):
    workspace = Workspace(tmp_path)
    workspace.write("caption", captioned(["word " * 40 for _ in range(12)]))
    wrong = Endpoint("huge", vllm.url, retries=0)
    with pytest.raises(ValueError, match=r"refuses every call for the model 'huge'.*check\s+url and model"):
        run_step(config(tmp_path, writer=wrong, timeline=TimelineOptions(max_chars=1000)), "timeline")

"""Prompts that update or engine could not take are known before a run, and skipped."""

import contextlib
import json
import logging
import sys
from dataclasses import replace

import pytest

from longrl.algorithms import Algorithm
from longrl.callbacks.rollout_checks import check_rollout_options
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media.sampling import VideoSampling
from longrl.engines.hf import HFEngine
from longrl.engines.server import VLLMServerEngine
from longrl.engines.vllm import VLLMEngine
from longrl.evaluation.local_policy import LocalPolicy
from longrl.features.cache import FeatureCache
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.policy import PolicyModule
from longrl.packing.lengths import LengthLimit, micro_batch_limit
from longrl.types import SamplingParams, UnusableSample
from tests.callbacks.test_rollout import SAMPLING, callback, data_module, ids, train
from tests.tiny import qwen3_vl_family, row, text_family, text_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]


class ShortEngine(HFEngine):
    """As vLLM with a small max_model_len: a longer prompt ends its call."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def max_length(self):
        return self.limit

    def generate(self, family, model, prompts, features, sampling, seed, first=0):
        assert all(len(prompt.input_ids) + sampling.max_completion_tokens <= self.limit for prompt in prompts)
        return super().generate(family, model, prompts, features, sampling, seed, first)


class SizedEngine(HFEngine):
    """As vLLM without a max_model_len: it takes what the run needs."""

    limit = 0

    def fit_lengths(self, max_prompt_tokens, max_completion_tokens):
        self.limit = max_prompt_tokens + max_completion_tokens

    def max_length(self):
        return self.limit


def test_a_missing_vllm_is_known_before_weights_load(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    policy = PolicyModule(text_family(), optimizer=OptimizerSettings(lr=1e-3))
    monkeypatch.setattr(policy.family, "build", lambda *args: pytest.fail("weights were loaded"))
    missing = r"VLLMEngine needs vllm, which is not installed; install .*\[vllm\].*--rollout.engine longrl.*HFEngine"
    with pytest.raises(ImportError, match=missing):
        train(tmp_path, callback(VLLMEngine()), policy=policy, data=data_module(tmp_path))


class OwnEngine(HFEngine):
    """A user's, which knows nothing of precision."""

    supports_fp32_lm_head = False


def test_an_engine_that_cannot_compute_the_head_in_float32_is_refused_before_weights_load(tmp_path):
    policy = PolicyModule(text_family(), Algorithm(fp32_lm_head=True))
    assert policy.family.fp32_lm_head
    check_rollout_options(policy, HFEngine(), SAMPLING, max_staleness=0, bypass_below=0.0)
    with pytest.raises(ValueError, match=r"OwnEngine does not say that it can .*set model\.algorithm\.fp32_lm_head"):
        check_rollout_options(policy, OwnEngine(), SAMPLING, max_staleness=0, bypass_below=0.0)


def test_router_replay_without_experts_or_an_engine_that_returns_them_is_refused(caplog):
    caplog.set_level(logging.INFO)
    for family, engine, message in (
        (text_family(), HFEngine(), r"needs a mixture of experts, and .* has none; set rollout.router_replay to false"),
        (
            qwen3_vl_family(True),
            VLLMServerEngine("http://x"),
            r"got VLLMServerEngine: its completions do not carry them",
        ),
        (qwen3_vl_family(True), VLLMEngine(), r"got VLLMEngine: vLLM .* on a GPU alone .*; use longrl.engines.hf"),
        (qwen3_vl_family(True, compile_layers=True), HFEngine(), r"needs layers that run as they are .*compile_layers"),
        (qwen3_vl_family(True), HFEngine(), None),
    ):
        family.router_replay = True
        policy = PolicyModule(family)
        with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message):
            check_rollout_options(policy, engine, SAMPLING, max_staleness=0, bypass_below=0.0)
    assert "old log-probabilities use the experts, of 4, that HFEngine chose" in caplog.text
    for engine, told in (
        (HFEngine(), "router_replay=true has the"),
        (VLLMServerEngine("http://x"), "do not carry them"),
    ):
        caplog.clear()
        policy = PolicyModule(qwen3_vl_family(True))
        check_rollout_options(policy, engine, SAMPLING, max_staleness=0, bypass_below=0.0)
        assert "trains without router replay: where engine and trainer pick" in caplog.text
        assert told in caplog.text


def test_router_replay_is_refused_where_one_rank_alone_would_get_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert VLLMEngine().router_replay_problem() is None
    assert "on one rank of tensor_parallel_size=2 alone" in str(
        VLLMEngine(tensor_parallel_size=2).router_replay_problem()
    )


def with_a_long_row(folder, **options):
    """Twelve sums, and among them a question of 200 words."""
    data = data_module(folder, **options)
    file = folder / "rows.jsonl"
    long = json.dumps({"problem": "word " * 200 + "1 + 1?", "answer": "2", "problem_id": "long"})
    file.write_text(long + "\n" + file.read_text())
    return data


def longest_sum(folder):
    data = data_module(folder)
    data.setup("fit")
    return max(len(prompt.input_ids) for prompt in data.draw_prompts(12))


def test_a_prompt_that_the_engine_cannot_take_is_skipped_not_the_end_of_the_run(tmp_path):
    limit = longest_sum(tmp_path) + SAMPLING.max_completion_tokens
    rollouts = callback(ShortEngine(limit))
    seen = train(tmp_path, rollouts, data=with_a_long_row(tmp_path), steps=6)
    trained = [prompt_id for batch in seen.batches for prompt_id in ids(batch.groups)]
    assert sorted(trained) == sorted(str(n) for n in range(1, 13))
    (line,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert line["id"] == "long"
    assert f"above {limit}, the max_model_len of ShortEngine; raise that to" in line["reason"]


def test_a_prompt_as_long_as_the_engines_limit_leaves_no_room_for_a_token_and_is_known_before_a_step(tmp_path):
    data = data_module(tmp_path)
    limit = longest_sum(tmp_path)
    data.max_skipped_share = 1.0
    data.setup("fit")
    (known,) = ShortEngine(limit).length_limits(replace(SAMPLING, max_completion_tokens=1))
    data.skip_decoding_if_cached(FeatureCache(text_family()), ("train",))
    for _ in range(2):  # as in a second stage
        data.limit_lengths([known], ("train",))
    assert data.datasets["train"].render.limits == (known,)
    assert data.datasets["train"].render.stored is not None
    lengths = [len(prompt.input_ids) for prompt in data.draw_prompts(2)]
    assert max(lengths) < limit


def test_the_same_holds_for_the_update(tmp_path):
    limit = longest_sum(tmp_path) + SAMPLING.max_completion_tokens
    policy = PolicyModule(text_family(), optimizer=OptimizerSettings(lr=1e-3), max_tokens_per_micro_batch=limit)
    train(tmp_path, callback(), policy=policy, data=with_a_long_row(tmp_path), steps=6)
    (line,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert f"above {limit}, the model.max_tokens_per_micro_batch; raise that to" in line["reason"]


def test_validation_has_the_engines_limit_too(tmp_path):
    limit = longest_sum(tmp_path) + SAMPLING.max_completion_tokens
    data = with_a_long_row(tmp_path)
    train(tmp_path, callback(ShortEngine(limit)), data=data, steps=1, limit_val_batches=1.0)
    lines = list(map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines()))
    assert ("val", "long") in {(line["split"], line["id"]) for line in lines}


def test_a_target_of_sft_counts_with_its_own_length(tmp_path):
    data = data_module(tmp_path, stage="sft")
    file = tmp_path / "rows.jsonl"
    wordy = json.dumps({"problem": "1 + 1?", "answer": "2", "reasoning": "I count. " * 100, "problem_id": "wordy"})
    file.write_text(wordy + "\n" + file.read_text())
    policy = PolicyModule(text_family(), optimizer=OptimizerSettings(lr=1e-3), max_tokens_per_micro_batch=200)
    train(tmp_path, callback(), policy=policy, data=data, steps=6)
    (line,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert line["id"] == "wordy"
    assert "with its longest completion, above 200, the model.max_tokens_per_micro_batch" in line["reason"]


def test_a_limit_on_prompts_that_lets_longer_ones_in_is_warned_of(tmp_path, caplog):
    data = data_module(tmp_path, max_prompt_tokens=5000)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, callback(ShortEngine(4000)), data=data)
    assert "the longest prompt of data.max_prompt_tokens has 5000 tokens" in caplog.text
    assert "above 4000, the max_model_len of ShortEngine" in caplog.text
    assert "longer prompts are skipped" in caplog.text


def test_an_engine_without_a_limit_holds_what_the_run_samples(tmp_path, caplog):
    """Validation may sample more tokens than training does."""
    engine = SizedEngine()
    longer = replace(SAMPLING, max_completion_tokens=SAMPLING.max_completion_tokens + 5)
    with caplog.at_level(logging.WARNING):
        rollout = callback(engine, eval_sampling=longer)
        train(tmp_path, rollout, data=data_module(tmp_path, max_prompt_tokens=500), steps=1)
    assert engine.limit == 505 + SAMPLING.max_completion_tokens
    assert "max_model_len" not in caplog.text


def test_ranks_that_share_a_sequence_take_more_together():
    renderer = RowRenderer(text_family(), VideoSampling(), question_template="{problem}")
    length = len(renderer(row("a", "1 + 1?")).input_ids)
    for ranks, fits in ((1, False), (2, True)):
        limited = replace(renderer, limits=(LengthLimit(length, "x", longest=length, ranks=ranks),))
        with contextlib.nullcontext() if fits else pytest.raises(UnusableSample, match=f"above {length}, the x"):
            limited(row("a", "1 + 1?"))
    assert micro_batch_limit(300, [1, 2, 4], 7) == LengthLimit(300, "model.max_tokens_per_micro_batch", 7, 4, True)


def test_an_evaluation_asks_its_engine():
    sampling = SamplingParams(max_completion_tokens=9)
    policy = LocalPolicy(text_family(), text_folder(), ShortEngine(50), device="cpu")
    assert policy.length_limits(sampling) == (LengthLimit(50, "max_model_len of ShortEngine", 9),)
    assert LocalPolicy(text_family(), text_folder(), device="cpu").length_limits(sampling) == ()

"""Runs with `rollout.environment`: from the command line to the step, by a tiny model and clips of its videos."""

import collections
import signal
from types import SimpleNamespace

import pytest
import torch

from longrl.callbacks.waiting_groups import restored_groups, saved_group
from longrl.commands.report import report_run
from longrl.engines.hf import HFEngine
from longrl.engines.rollout_engine import RolloutRequest, generate_shards
from longrl.io.jsonl import read_jsonl
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Completion, Group, SamplingParams
from tests.distributed import run_distributed
from tests.runs import checkpoint, config, data_order, metrics, rollouts, run, run_in_child
from tests.test_resume import LAST, assert_same_end, carried, killed
from tests.tiny import frames, row, vl_family

ENVIRONMENT = {"make": "tests.environment_runs.Clips", "max_turns": 3, "max_observed_tokens": 200, "num_workers": 1}
STEPS = 3


def rl(engine="ShortTurns", **environment):
    """Two prompts per step, two completions each, and clips between their turns; groups are carried over."""
    values = config("rl")
    values["rollout"] = rollouts("tests.environment_runs.by_tokens", environment=ENVIRONMENT | environment)
    values["rollout"]["seed"] = 1
    values["rollout"]["engine"] = {"class_path": f"tests.environment_runs.{engine}"}
    values["rollout"]["sampling"] = {"num_generations": 2, "max_completion_tokens": 6}
    values["trainer"] |= {"max_steps": STEPS}
    samples = {"class_path": "longrl.callbacks.generations.Generations", "init_args": {"every_n_steps": 1}}
    values["trainer"]["callbacks"].append(samples)
    values["model"]["max_tokens_per_micro_batch"] = 4000
    values["model"]["algorithm"] = {"select": "tests.environment_runs.first_two"}
    values["data"] |= {"prompts_per_batch": 3}
    values["checkpoint"] = {"every_n_train_steps": 1}
    return values


@pytest.fixture(scope="module")
def encoded():
    """How often each media item went through the encoder during the reference run."""
    return collections.Counter()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, encoded):
    encode = Qwen2_5_VLFamily.encode_media

    def counted(self, model, media):
        encoded.update(item.key for item in media)
        return encode(self, model, media)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2_5_VLFamily, "encode_media", counted)
        return run(tmp_path_factory.mktemp("reference") / "run", rl())


def test_the_update_scores_what_was_sampled_between_clips(reference):
    logged = metrics(reference)
    for step in range(STEPS):
        assert float(logged[step, "rollout/observed_tokens"]) > 0
        assert float(logged[step, "train/mismatch_max"]) < 1e-4
    assert any(float(logged[step, "train/grad_norm"]) for step in range(STEPS))


def test_a_clip_is_encoded_once_whoever_asks_for_it_again(reference, encoded):
    logged = metrics(reference, timings=True)
    shown = sum(float(logged[step, "throughput/media_shown_encoded"]) for step in range(STEPS))
    assert shown > 0
    assert set(encoded.values()) == {1}


def test_samples_show_their_turns_and_what_tools_showed(reference):
    samples = read_jsonl(reference / "samples.jsonl")
    assert len(samples) == 4 * STEPS
    assert {turn["role"] for sample in samples for turn in sample["turns"]} == {"assistant", "tool"}
    assert list((reference / "pictures").glob("shown_*.png"))
    report = report_run(str(reference)).read_text()
    assert "-&gt; crop_video(start_s=" in report
    assert "Frames that a completion asked for after step" in report


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, reference):
    values = rl()
    folder = tmp_path / "run"
    assert run_in_child(folder, killed(values, 1, "saved")) == -signal.SIGKILL
    completions = [one for group in carried(folder) for one in group["completions"]]
    assert any(one["media"] for one in completions)
    assert any(one["turns"] for one in completions)
    run(folder, values, f"--ckpt_path={folder / LAST}")
    assert_same_end(folder, reference)


@pytest.mark.slow
def test_turns_sampled_during_the_update_are_resumed_bit_for_bit(tmp_path):
    values = rl("Elsewhere")
    values["rollout"]["max_staleness"] = 1
    whole = run(tmp_path / "whole", values)
    assert sum(float(value) for (_, name), value in metrics(whole).items() if name == "rollout/observed_tokens") > 0
    folder = tmp_path / "run"
    assert run_in_child(folder, killed(values, 2, "saved")) == -signal.SIGKILL
    (waiting,) = checkpoint(folder)["callbacks"]["RolloutCallback"]["waiting"]
    assert any(one["media"] for group in waiting["ahead"] for one in group["completions"])
    run(folder, values, f"--ckpt_path={folder / LAST}")
    assert_same_end(folder, whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rollout": {"engine": {"class_path": "tests.environment_runs.OneTurn"}}}, "OneTurn does not: it samples"),
        ({"rollout": {"environment": {"make": "tests.environment_runs.Nothing"}}}, "has no 'Nothing'"),
    ],
    ids=["engine", "name"],
)
def test_what_cannot_be_is_refused_before_weights_are_loaded(tmp_path, change, said):
    values = rl()
    for group, options in change.items():
        values[group] |= options
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "run", values)


def test_a_group_that_was_shown_what_no_file_has_is_dropped_when_a_run_goes_on():
    """Pixels are not saved. Completions of checkpoints from before there were environments are read as they were."""
    family = vl_family()
    media = family.patch(frames(4, 56, 56, "made up"))
    scores = torch.zeros(2)
    plain = {"token_ids": scores.long(), "logprobs": scores, "text": "", "finish_reason": "stop"}
    prompt = family.render(row("a"), "What?")
    for shown, count in (((), 1), ((media,), 0)):
        group = Group(prompt, [Completion(**plain, media=shown)], scores[:1], {}, scores[:1] == 0)
        saved = saved_group(group)
        if not shown:
            saved["completions"] = [plain]
        restored = restored_groups([saved], lambda record: family.render(record, "What?"), SINGLE_RANK)
        assert len(restored) == count


def test_what_is_shown_is_encoded_as_prompts_are_outside_the_precision_of_the_step():
    """Encoded again, for the cache has let go of it or the run was resumed, it must have the same bits."""
    seen = []

    class Runner:
        def begin(self, *args):
            return [[]]

        def answers(self, model, features):
            seen.append(torch.is_autocast_enabled("cpu"))

    class Engine(HFEngine):
        def generate_turns(self, *args):
            seen.append(torch.is_autocast_enabled("cpu"))

    prompt = SimpleNamespace(id="a")
    request = RolloutRequest([prompt], [prompt], [SamplingParams(1, 2)], seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        generate_shards(Engine(), None, torch.nn.Linear(1, 1), request, {}, SINGLE_RANK, Runner())
    assert seen == [False, True]


def steps_on(folder, devices, values):
    """The completions of each step, the features that each rank sent through the encoder, and the loss."""
    values = values | {"trainer": values["trainer"] | {"devices": devices}}
    if devices > 1:
        values["trainer"]["strategy"] = {
            "class_path": "longrl.strategies.mr_sp.MRSPStrategy",
            "init_args": {"sequence_parallel_size": devices},
        }
    run(folder, values)


@pytest.mark.slow
def test_ranks_that_share_a_sequence_train_on_what_each_was_shown(tmp_path, reference):
    """Each rank's environments answer its own completions; both score all of them, with media that one has seen."""
    run_distributed(steps_on, 2, tmp_path / "two", 2, rl())
    assert data_order(tmp_path / "two") == data_order(reference)
    together, alone = metrics(tmp_path / "two"), metrics(reference)
    for step in range(STEPS):
        assert float(together[step, "train/mismatch_max"]) < 1e-4
        for name in ("train/grad_norm", "rollout/tool_calls", "rollout/observed_tokens", "rollout/tool_errors"):
            assert float(together[step, name]) == pytest.approx(float(alone[step, name]), rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_an_encoder_that_trains_encodes_what_was_shown_once_more_in_the_update(tmp_path):
    values = rl()
    values["trainer"] |= {"max_steps": 1}
    values["model"]["family"]["init_args"]["freeze_vision_encoder"] = False
    folder = run(tmp_path / "run", values)
    assert float(metrics(folder)[0, "rollout/observed_tokens"]) > 0
    assert float(metrics(folder)[0, "train/grad_norm_vision_encoder"]) > 0
    values = rl("Elsewhere")
    values["rollout"]["max_staleness"] = 1
    values["model"]["family"]["init_args"]["freeze_vision_encoder"] = False
    with pytest.raises(ValueError, match=r"max_staleness=1 lets the update change.*freeze_vision_encoder to true"):
        run(tmp_path / "overlap", values)


def test_a_limit_that_is_too_low_for_what_is_shown_names_both(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"above 4000, the model.max_tokens_per_micro_batch"):
        run(tmp_path / "run", rl(max_observed_tokens=4096))
    assert "or rollout.environment.max_observed_tokens (now 4096); longer prompts are skipped" in caplog.text

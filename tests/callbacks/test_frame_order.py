"""T-GRPO: which completions earn the bonus, and the groups with shuffled frames beside those that train."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch

from longrl.algorithms import Algorithm, greedy_centered, group_centered
from longrl.callbacks.frame_order import FrameOrder, check_categories, check_frame_order, order_bonus
from longrl.callbacks.group_scores import scored_groups
from longrl.engines.hf import HFEngine
from longrl.engines.rollout_engine import RolloutRequest, generate_shards
from longrl.environments.settings import EnvironmentSettings
from longrl.modules.policy import OptimizerSettings, PolicyModule
from longrl.rewards import RewardSum, RewardTerm
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Group, Row, SamplingParams
from tests.callbacks.test_rollout import Elsewhere, FakeEngine, callback, encodes, train, video_data
from tests.families import FAMILIES
from tests.runs import checkpoint, config, metrics, rollouts, run
from tests.tiny import row, vl_family


def right(completion, row):
    return float(completion.text == "right")


def odd(completion, row):
    return float(int(completion.token_ids.sum()) % 2)


RIGHT = RewardSum([RewardTerm(right, name="accuracy")])
SAMPLING = SamplingParams(5, 4)
PARALLEL = {"world": SINGLE_RANK, "num_gather_chunks": 1}


# ---- who earns the bonus ----


@pytest.mark.parametrize(
    ("accuracy", "shuffled", "rewards"),
    [
        # As the lines of Video-R1's trainer give them: accuracy + form + 0.3 where p >= 0.8 * q, of accuracy above 0.1.
        ([1.0, 0.0, 0.0, 0.0], [0.0, 1.0], [2.0, 1.0, 1.0, 0.0]),
        ([1.0, 1.0, 0.0, 0.0], [1.0, 0.0], [2.3, 2.3, 1.0, 0.0]),
        ([1.0, 1.0, 0.0, 0.0], [1.0, 1.0], [2.0, 2.0, 1.0, 0.0]),
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0], [1.0, 1.0, 1.0, 0.0]),
        ([0.05, 0.5, 1.0, 0.0], [0.25, 0.5], [1.05, 1.8, 2.3, 0.0]),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0], [2.3, 2.3, 2.3, 1.3]),
    ],
)
def test_the_bonus_is_that_of_video_r1s_code(accuracy, shuffled, rewards):
    form = torch.tensor([1.0, 1.0, 1.0, 0.0])
    parts = {"accuracy": torch.tensor(accuracy), "form": form}
    group = Group(None, [], parts["accuracy"] + form, parts, torch.ones(4, dtype=torch.bool))
    group.shuffled_accuracy = torch.tensor(shuffled)
    FrameOrder().add_bonus([group])
    torch.testing.assert_close(group.rewards, torch.tensor(rewards))
    assert set(group.reward_parts["order"].tolist()) <= {0.0, 1.0}
    assert group.part_weights == {"order": 0.3}


def test_what_could_not_be_judged_enters_no_mean_and_earns_nothing():
    accuracy = torch.tensor([1.0, 1.0, 0.0, torch.nan])
    valid = torch.tensor([True, False, True, True])
    assert order_bonus(accuracy, valid, torch.tensor([0.5]), ratio=1.0).tolist() == [1, 0, 0, 0]
    assert order_bonus(accuracy, valid, torch.tensor([0.75]), ratio=1.0).tolist() == [0, 0, 0, 0]
    assert order_bonus(accuracy, valid, torch.zeros(0), ratio=1.0).isnan().all()
    assert order_bonus(accuracy, torch.zeros(4).bool(), torch.ones(2), ratio=1.0).isnan().all()
    group = Group(None, [], torch.tensor([1.0, 0.0]), {"accuracy": torch.ones(2)}, torch.tensor([True, False]))
    group.shuffled_accuracy = torch.zeros(2)
    FrameOrder(bonus=0.5).add_bonus([group])
    assert group.rewards.tolist() == [1.5, 0.0]


# ---- rollouts ----


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_shuffled_completions_are_compared_with_and_never_trained_on(tmp_path, max_staleness):
    """Of 2 of 4 completions right in order and none shuffled, the right ones earn the bonus."""

    def script(prompt_id, count):
        return ["wrong"] * count if "shuffled" in prompt_id else (["right", "wrong"] * count)[:count]

    engine = (Elsewhere if max_staleness else FakeEngine)(script)
    options = {"frame_order": FrameOrder(bonus=0.25), "max_staleness": max_staleness}
    rollouts = callback(engine, reward=RIGHT, sampling=SamplingParams(4, 4), **options)
    seen = train(tmp_path, rollouts, data=video_data(tmp_path, prompts_per_batch=2), steps=2)
    rollouts.state_dict()  # waits for what was begun last
    assert [call.sampling.num_generations for call in engine.calls[:4]] == [4, 2, 4, 2]
    assert engine.calls[1].ids == [f"{name} (shuffled)" for name in engine.calls[0].ids]
    for batch in seen.batches:
        for group in batch.groups:
            assert len(group.completions) == 4
            assert group.rewards.tolist() == [1.25, 0.0, 1.25, 0.0]
            assert not any(item.cell_order for item in group.prompt.media)
    for logged in seen.metrics:
        assert logged["reward/order"] == 0.5
        assert logged["rollout/accuracy_in_order"] == 0.5
        assert logged["rollout/accuracy_shuffled"] == 0.0
        assert logged["reward/mean"] == 0.625


def test_nothing_is_encoded_for_shuffled_frames_and_they_differ_from_rollout_to_rollout(tmp_path):
    data = video_data(tmp_path, prompts_per_batch=8, freeze_vision_encoder=True)
    policy = PolicyModule(data.renderer.family, optimizer=OptimizerSettings(lr=1e-3))
    count = encodes(policy)
    shown = []

    class Noting(HFEngine):
        def generate(self, family, model, prompts, *args, **kwargs):
            shown.append([item.key for prompt in prompts for item in prompt.media])
            return super().generate(family, model, prompts, *args, **kwargs)

    reward = RewardSum([RewardTerm(odd, name="accuracy"), RewardTerm(odd, name="form")])
    rollouts = callback(Noting(), reward=reward, frame_order=FrameOrder())
    train(tmp_path, rollouts, policy=policy, data=data, max_epochs=2)
    assert sum(count) == 2, "two videos"
    plain, first, again, second = (set(keys) for keys in shown)
    assert plain == again
    assert len(plain) == 2
    assert not plain & first
    assert first != second
    assert len(first) > 2, "each prompt of a video has an order of its own"


def test_prompts_without_frames_to_shuffle_or_of_other_categories_are_sampled_as_ever():
    family = vl_family()
    mixed, video, text = FAMILIES["qwen2.5-vl"].prompts(family)
    video = dataclasses.replace(video, row=row("video", category="temporal"))
    prompts = [text, mixed, video]
    request = RolloutRequest(prompts, prompts, [SamplingParams(5, 4)], 7)
    found = FrameOrder().shuffled_request(family, request, request.samplings[0])
    assert found.shuffled_of == [1, 2]
    assert [item.num_generations for item in found.shuffled.samplings] == [2]
    assert [bool(item.cell_order) for item in found.shuffled.prompts[0].media] == [True, False, True]
    temporal = FrameOrder(num_generations=3, categories=["temporal"])
    assert temporal.shuffled_request(family, request, request.samplings[0]).shuffled_of == [2]
    again = FrameOrder().shuffled_request(family, request, request.samplings[0])
    assert [item.key for item in again.shuffled.prompts[1].media] == [
        item.key for item in found.shuffled.prompts[1].media
    ]

    # A rank none of whose prompts has a video scores as often as others, which wait for it.
    engine = FakeEngine(lambda prompt_id, count: ["right"] * count)
    alone = FrameOrder().shuffled_request(family, RolloutRequest([text], [text], request.samplings, 7), SAMPLING)
    generated = generate_shards(engine, family, None, alone, {}, SINGLE_RANK)
    groups = scored_groups(RIGHT, alone, generated, SimpleNamespace(**PARALLEL, sp_group=SINGLE_RANK), 1)
    FrameOrder().add_bonus(groups)
    assert groups[0].reward_parts["order"].isnan().all()
    assert groups[0].rewards.tolist() == [1.0] * 5


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_that_share_prompts_find_the_comparisons_of_one_rank(size):
    family = vl_family()
    mixed, video, text = FAMILIES["qwen2.5-vl"].prompts(family)
    prompts = [text, mixed, video]
    plain = RolloutRequest(prompts, prompts, [SAMPLING], 7)
    request = FrameOrder(num_generations=4).shuffled_request(family, plain, SAMPLING)

    class Numbered(FakeEngine):
        """Right of which completions depends on prompt and number alone."""

        def generate(self, family, model, prompts, features, sampling, seed, first=0):
            def script(name, count):
                return ["right" if (first + n) % (2 + len(name) % 3) else "wrong" for n in range(count)]

            self.script = script
            return super().generate(family, model, prompts, features, sampling, seed, first)

    def local(rank):
        return generate_shards(Numbered(None), family, None, request, {}, SimpleNamespace(rank=rank, size=size))

    calls = []
    for of_ranks in zip(*(local(rank) for rank in range(size)), strict=True):
        RIGHT.score([group for shards in of_ranks for _, group in shards])
        calls.append([
            (shard, group.completions, group.rewards, group.reward_parts, group.valid, group.part_weights)
            for shards in reversed(of_ranks)
            for shard, group in shards
        ])  # fmt: skip
    received = iter(calls)
    axis = SimpleNamespace(rank=1, size=size, gather_list=lambda local, num_chunks: next(received))
    found = scored_groups(RIGHT, request, local(1), SimpleNamespace(**PARALLEL, sp_group=axis), 1)
    alone = generate_shards(Numbered(None), family, None, request, {}, SINGLE_RANK)
    wanted = scored_groups(RIGHT, request, alone, SimpleNamespace(**PARALLEL, sp_group=SINGLE_RANK), 1)
    assert [group.shuffled_accuracy is None for group in found] == [True, False, False]
    for one, other in zip(found[1:], wanted[1:], strict=True):
        assert len(one.shuffled_accuracy) == 4
        assert one.shuffled_accuracy.tolist() == other.shuffled_accuracy.tolist()


def test_a_resumed_run_compares_with_the_same_frames_as_the_uninterrupted_one(tmp_path):
    values = config("rl", freeze_vision_encoder=True)
    terms = [{"function": "tests.runs.rare", "name": name} for name in ("accuracy", "form")]
    values["rollout"] = rollouts(reward="") | {"reward": {"terms": terms}, "frame_order": {"bonus": 0.5, "ratio": 0.5}}
    values["trainer"] |= {"max_steps": 4}
    values["checkpoint"] = {"every_n_train_steps": 2, "save_top_k": -1}
    whole = run(tmp_path / "whole", values)
    part = shutil.copytree(whole, tmp_path / "part")
    saved = next((part / "checkpoints").glob("*step=2*"))
    resumed = run(tmp_path / "resumed", values, f"--ckpt_path={saved}")
    assert {name for _, name in metrics(whole)} >= {"reward/order", "rollout/accuracy_shuffled"}
    late = {key: value for key, value in metrics(whole).items() if key[0] >= 2}
    assert {key: value for key, value in metrics(resumed).items() if key[0] >= 2} == late
    ends = [checkpoint(folder)["state_dict"] for folder in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "algorithm", "message"),
    [
        ({"reward": RewardSum([RewardTerm(odd)])}, None, "compares the part 'accuracy' of the reward, got odd"),
        ({"reward": RewardSum([RewardTerm(odd, name="accuracy"), RewardTerm(odd, name="order")])}, None, "'order'"),
        ({"max_staleness": 2}, None, r"rollout\.max_staleness=2 weights change within them; lower that to 1"),
        ({"environment": EnvironmentSettings("x.Y")}, None, "leave the environment out"),
        ({}, Algorithm(advantage=greedy_centered, greedy_baseline=True), r"set model\.algorithm\.greedy_baseline"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, algorithm, message):
    module = SimpleNamespace(algorithm=algorithm or Algorithm())
    given = {"reward": RIGHT, "max_staleness": 0, "environment": None} | options
    has_turns = given["environment"] is not None
    arguments = (module, given["reward"], given["max_staleness"], has_turns)
    with pytest.raises(ValueError, match=rf"^rollout\.frame_order .*{message}.*set rollout\.frame_order to null"):
        check_frame_order(FrameOrder(), *arguments)
    check_frame_order(None, *arguments)


def test_a_category_that_no_row_has_is_refused():
    rows = [Row("a", "?", "A", category="temporal"), Row("b", "?", "A", category="plot")]
    for fine in (None, FrameOrder(), FrameOrder(categories=["plot"])):
        check_categories(fine, rows)
    for names in (["temporl"], ["plot", "x"], []):
        with pytest.raises(ValueError, match=r"rollout\.frame_order\.categories .* which are plot, temporal, got \["):
            check_categories(FrameOrder(categories=names), rows)


def test_a_bonus_that_its_deviation_takes_out_again_is_told(caplog):
    check_frame_order(FrameOrder(), SimpleNamespace(algorithm=Algorithm(advantage=group_centered)), RIGHT, 0, False)
    assert not caplog.records
    check_frame_order(FrameOrder(), SimpleNamespace(algorithm=Algorithm()), RIGHT, 0, False)
    assert "next to no effect" in caplog.text

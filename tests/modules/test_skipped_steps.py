"""Steps whose loss or gradient norm is not finite: nothing moves, all ranks agree, and the batch can be read again."""

import dataclasses
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import save

from longrl.algorithms import Algorithm, StaleClipped
from longrl.commands.replay import recorded_loss
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits, FileFrames
from longrl.models.lora import LoRASettings
from longrl.modules.mini_batches import RolloutLoss, flatten_groups, make_mini_batches
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.skipped_steps import (
    FOLDER,
    MAX_RECORDS,
    SkippedSteps,
    StepRecord,
    load_step_record,
    recorded_continuations,
    replay_batch,
    text_record,
    write_step_record,
)
from longrl.modules.token_statistics import TokenStatistics
from longrl.packing.pack import pack
from longrl.strategies.axis import SINGLE_RANK
from longrl.strategies.mr_sp import MRSPStrategy
from longrl.testing.sample_turns import random_turns
from longrl.types import FULL_SHARD, Batch, Continuation, FrameShard, PolicyOutput
from tests.distributed import run_distributed
from tests.modules.test_policy import (
    LENGTHS,
    REWARDS,
    answers_of,
    policy_of,
    sampled,
    text_prompts,
    tokens_of,
    train,
    with_targets,
    with_turns,
)
from tests.runs import checkpoint, metrics, rollouts, run, text_config
from tests.tiny import answers_with_experts, random_completions, row, text_family, vl_family

POISON = "~"
"""A character whose embedding overflows in these tests; no other prompt has it."""
NAN = float("nan")


def poison_embeddings(policy):
    """Rows that hold `POISON` have no finite loss, as with weights that overflow on a rare token."""
    (token,) = policy.family.tokenizer(POISON, add_special_tokens=False)["input_ids"]

    def overflow(module, args, output):
        return output.masked_fill((args[0] == token)[..., None], NAN)

    policy.model.get_input_embeddings().register_forward_hook(overflow)


def poisoned_prompts(family, count=3):
    """The last of them overflows: whatever the micro-batch, its step is lost."""
    prompts = text_prompts(family, count - 1)
    return [*prompts, family.render(row("poisoned"), f"Which one? {POISON}")]


def rl_batch(family, prompts, **options):
    return Batch(prompts, groups=sampled(family, prompts, **options))


def batches_of(family, kinds, stage):
    """`g` is a good batch, `b` one with a poisoned row."""
    batches = []
    for kind in kinds:
        prompts = text_prompts(family) if kind == "g" else poisoned_prompts(family)
        batches.append(Batch(with_targets(prompts)) if stage == "sft" else rl_batch(family, prompts))
    return batches


def trained(policy, kinds, stage, folder, **options):
    batches = batches_of(policy.family, kinds, stage)
    return train(policy, *batches, before=poison_embeddings, default_root_dir=folder, **options)


CASES = {
    "sft": {},
    "sft, clipped, micro-batches": {"max_grad_norm": 0.01, "max_tokens_per_micro_batch": 57},
    "sft in bfloat16": {"family": {"dtype": "bfloat16"}},
    "rl": {"algorithm": Algorithm(kl_coef=0.1)},
    "rl, several updates": {"mini_batches_per_rollout": 3, "epochs_per_rollout": 2, "max_nonfinite_steps": 9},
    "rl of adapters": {"family": {"lora": LoRASettings(rank=2)}, "algorithm": Algorithm(kl_coef=0.1)},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_left_out_is_as_if_it_had_not_been(case, tmp_path):
    """Weights, moments, schedule and step count of good, bad, good are those of good, good, to the last bit."""
    stage = case.partition(" ")[0].rstrip(",")
    options = {**CASES[case]}
    family_options = options.pop("family", {})
    policies, records = [], []
    for kinds in ("gbg", "gg"):
        torch.manual_seed(0)
        optimizer = OptimizerSettings(lr=1e-3, schedule="cosine", warmup_steps=1, total_steps=20)
        policy = policy_of(text_family(**family_options), **{"optimizer": optimizer, **options})
        records.append(trained(policy, kinds, stage, tmp_path / kinds))
        policies.append(policy)
    bad, good = records
    if case == "rl, several updates":  # the mini-batches beside the bad one are good
        assert bad.steps == good.steps + 4
        assert [each["train/nonfinite_steps"] for each in bad.metrics] == [0, 2, 2]
        assert all(value.isfinite().all() for value in policies[0].model.state_dict().values())
        return
    assert bad.steps == good.steps == 2
    assert [each["train/nonfinite_steps"] for each in bad.metrics] == [0, 1, 1]
    assert bad.rates == good.rates
    assert math.isnan(bad.metrics[1]["train/loss"])
    assert bad.metrics[2]["train/loss"] == good.metrics[1]["train/loss"]
    of_bad, of_good = (policy.model.state_dict() for policy in policies)
    assert all(torch.equal(value, of_bad[name]) for name, value in of_good.items())
    states = [policy.trainer.optimizers[0].state_dict()["state"] for policy in policies]
    for number, moments in states[1].items():
        assert all(torch.equal(value, states[0][number][name]) for name, value in moments.items())
    assert policies[0].trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2


def infinite(logp, ref_logp):
    """A divergence without gradient: the loss is infinite, and no gradient shows it."""
    return torch.full_like(logp, math.inf)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_finite_loss_with_an_infinite_gradient_is_left_out_and_the_other_way_around(bad, tmp_path):
    algorithm = Algorithm(kl=infinite, kl_coef=0.1) if bad == "loss" else Algorithm()
    policy = policy_of(text_family(), algorithm=algorithm, max_nonfinite_steps=1)
    policy.configure_model()
    start = {name: value.clone() for name, value in policy.model.state_dict().items()}

    def break_gradient(policy):
        if bad == "gradient":
            weight = policy.model.get_input_embeddings().weight
            weight.register_hook(lambda gradient: gradient * math.inf)

    batch = rl_batch(policy.family, text_prompts(policy.family))
    with pytest.raises(RuntimeError, match=r"loss or gradient norm of 1 optimizer steps in a row was not finite"):
        train(policy, batch, before=break_gradient, default_root_dir=tmp_path)
    assert all(torch.equal(value, start[name]) for name, value in policy.model.state_dict().items())
    (file,) = (tmp_path / FOLDER).iterdir()
    facts = load_step_record(file).facts
    assert math.isfinite(facts["grad_norm"]) == (bad == "loss")
    assert math.isfinite(facts["loss"]) == (bad == "gradient")


def test_so_many_in_a_row_end_the_run_and_a_good_one_begins_anew(tmp_path):
    policy = policy_of(text_family(), max_nonfinite_steps=2)
    seen = trained(policy, "bgbgb", "sft", tmp_path)
    assert seen.steps == 2
    policy = policy_of(text_family(), max_nonfinite_steps=2)
    with pytest.raises(RuntimeError, match=r"of 2 optimizer steps.*load_step_record.*lower model\.optimizer\.lr"):
        trained(policy, "gbbg", "sft", tmp_path / "ends")
    with pytest.raises(ValueError, match=r"model\.max_nonfinite_steps must be at least 1, got 0"):
        policy_of(text_family(), max_nonfinite_steps=0)


# ---- records ----


def rendered_as(prompts):
    """Renders a row again, as a run's own renderer does."""
    by_id = {prompt.id: prompt for prompt in prompts}
    return lambda row: by_id[row.id]


@pytest.mark.parametrize("turns", [False, True], ids=["one turn", "turns"])
def test_a_record_holds_all_that_the_step_read_and_replays_it(tmp_path, turns):
    """The gradient is broken and the loss is not, so the record's loss is that of the step taken again."""

    def break_gradient(policy):
        policy.model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * NAN)

    algorithm = Algorithm(kl_coef=0.1)
    family = text_family()
    prompts = text_prompts(family)
    sampler = -torch.rand(sum(map(sum, [[3, 7, 4], [5, 1, 6], [2, 9, 3]])))
    batch = rl_batch(family, prompts, sampler=sampler)
    if turns:
        batch.groups = with_turns(family, batch.groups)
        sampler = torch.cat([one.logprobs for group in answers_of(batch.groups) for one in group])
    batch.groups[1].valid[2] = False
    policy = policy_of(family, algorithm=algorithm)
    train(policy, batch, before=break_gradient, default_root_dir=tmp_path)
    (file,) = (tmp_path / FOLDER).iterdir()
    assert file.name == "step_00000000_1_rank_0.safetensors"
    record = load_step_record(file)
    assert list(record.rows) == [prompt.row for prompt in prompts]
    assert record.facts["temperature"] == 1.0
    assert math.isnan(record.facts["grad_norm"])
    assert {"advantages", "ref_logp", "sampler_logp", "weights", "rewards", "valid"} <= record.tensors.keys()
    assert torch.equal(record.tensors["sampler_logp"], sampler)
    assert all(torch.equal(record.tensors[f"input_ids.{i}"], prompt.input_ids) for i, prompt in enumerate(prompts))

    again = replay_batch(record, rendered_as(prompts))
    for found, wanted in zip(again.groups, batch.groups, strict=True):
        assert torch.equal(found.rewards, wanted.rewards)
        assert torch.equal(found.valid, wanted.valid)
        for ours, theirs in zip(found.completions, wanted.completions, strict=True):
            assert torch.equal(ours.token_ids, theirs.token_ids)
            assert ours.num_sampled == theirs.num_sampled
    torch.manual_seed(0)
    seen = train(policy_of(text_family(), algorithm=algorithm), again, default_root_dir=tmp_path)
    assert seen.metrics[0]["train/loss"] == pytest.approx(record.facts["loss"], rel=1e-6)
    assert seen.steps == 1


def test_which_tokens_learned_and_how_old_they_were_is_on_record():
    family = text_family()
    policy = policy_of(family, algorithm=Algorithm(surrogate=StaleClipped(0.0, 0.0), top_entropy_share=0.3))
    groups = rl_batch(family, text_prompts(family), carried_over=True).groups
    flat = flatten_groups(groups, torch.device("cpu"))
    scores = torch.rand(len(flat.sampler_logp), generator=torch.Generator().manual_seed(2))
    known = TokenStatistics(logp=-scores, entropy=scores)
    (batch,) = make_mini_batches(flat, 1, policy.algorithm, SINGLE_RANK, -scores, None, known)
    loss = RolloutLoss(policy.algorithm, batch)
    prompts = [group.prompt for group in groups]
    found = recorded_loss(policy, text_record(prompts, answers_of(groups), loss))
    (packed,) = pack(prompts, tokens_of(groups), 10_000)
    logp = torch.rand(len(scores), generator=torch.Generator().manual_seed(3)) - 1
    output = PolicyOutput(logp, scores)
    assert found(packed, output).loss == loss(packed, output).loss


def test_what_completions_were_shown_is_on_record(tmp_path):
    """Media without pixels, to be decoded on one rank; of a target that is rendered again, with them."""
    family = vl_family()
    prompts = text_prompts(family)
    cropped = VideoSampling(fps=4.0, span_s=(1.5, 3.0))
    file = FileFrames("clip.mp4", cropped, FrameShard(1, 2), 2, DecodeLimits())
    groups = [
        [replace(one, media=tuple(replace(item, source=file) for item in one.media)) for one in group]
        for group in random_turns(family, prompts)
    ]
    path = tmp_path / "step.safetensors"
    write_step_record(path, text_record(prompts, groups, SimpleNamespace(tensors=dict)), {})
    record = load_step_record(path)
    targets = [replace(prompt, response=group[-1]) for prompt, group in zip(prompts, groups, strict=True)]
    wanted = [one for group in groups for one in group]
    for found, again, theirs in zip(
        recorded_continuations(record), recorded_continuations(record, targets), wanted, strict=True
    ):
        for name in ("token_ids", "sampled", "position_ids"):
            value = getattr(theirs, name)
            assert getattr(found, name) is None if value is None else torch.equal(getattr(found, name), value)
        source = replace(file, shard=FULL_SHARD)
        expected = [replace(item, source=source, patches=None) for item in theirs.media]
        assert [replace(item, patches=None) for item in found.media] == expected
        if theirs.media and any(theirs is group[-1] for group in groups):
            assert all(
                torch.equal(ours.patches, item.patches) for ours, item in zip(again.media, theirs.media, strict=True)
            )


def test_the_experts_of_a_step_are_on_record(tmp_path):
    prompts = text_prompts(text_family())
    groups = sampled(text_family(), prompts)
    answers = answers_with_experts(prompts, tokens_of(groups), shape=(3, 2), num_experts=4)
    loss = SimpleNamespace(
        tensors=lambda: {"rewards": REWARDS, "valid": REWARDS > -1, "sampler_logp": torch.zeros(sum(map(sum, LENGTHS)))}
    )
    file = tmp_path / "step.safetensors"
    write_step_record(file, text_record(prompts, answers, loss), {})
    again = replay_batch(load_step_record(file), rendered_as(prompts))
    for found, wanted in zip(again.groups, answers, strict=True):
        assert torch.equal(found.completions[0].prompt_experts, wanted[0].prompt_experts)
        assert found.completions[1].prompt_experts is None
        for ours, theirs in zip(found.completions, wanted, strict=True):
            assert torch.equal(ours.experts, theirs.experts)


def damaged_records(file):
    """Bytes that are no record: none, text, a cut file, another file of tensors, and one of another header."""
    whole = file.read_bytes()
    foreign = save({"a": torch.ones(2)})
    return b"", b"hello", whole[:-1], whole[:50], foreign, whole.replace(b"videos", b"vidoes")


def test_a_file_that_is_no_record_is_a_mistake_of_the_user(tmp_path):
    file = tmp_path / "step.safetensors"
    write_step_record(file, StepRecord([row("1")], {"weights": torch.ones(1)}), {"global_step": 3})
    assert load_step_record(file).facts == {"global_step": 3}
    for content in damaged_records(file):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"step.safetensors is no record of an optimizer step"):
            load_step_record(file)
        write_step_record(file, StepRecord([row("1")], {"weights": torch.ones(1)}), {"global_step": 3})
    with pytest.raises(FileNotFoundError):
        load_step_record(tmp_path / "none.safetensors")


def test_an_sft_step_replays_too_and_its_row_is_named(tmp_path, caplog):
    trained(policy_of(text_family()), "b", "sft", tmp_path)
    assert "Rows ['0', '1', 'poisoned']" in caplog.text
    (file,) = (tmp_path / FOLDER).iterdir()
    record = load_step_record(file)
    prompts = poisoned_prompts(text_family())
    again = replay_batch(record, rendered_as(prompts))
    for found, wanted in zip(again.prompts, with_targets(prompts), strict=True):
        assert torch.equal(found.response.token_ids, wanted.response.token_ids)
    policy = policy_of(text_family())
    seen = train(policy, again, before=poison_embeddings, default_root_dir=tmp_path / "again")
    assert math.isnan(seen.metrics[0]["train/loss"])


def test_records_are_limited_and_a_full_disk_costs_one_alone(tmp_path, caplog):
    steps = SkippedSteps(limit=99)
    facts = {"global_step": 4, "rank": 1, "loss": NAN, "grad_norm": 1.0}
    for _ in range(MAX_RECORDS + 3):
        steps.add(tmp_path, lambda: StepRecord([row()], {}), facts)
    assert len(list((tmp_path / FOLDER).iterdir())) == MAX_RECORDS
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / FOLDER).write_text("no folder can be made here")
    others = SkippedSteps(limit=2)
    others.add(tmp_path / "full", lambda: StepRecord([row()], {}), facts)
    assert "their batch is lost" in caplog.text
    restored = SkippedSteps(limit=2)
    restored.load_state_dict(others.state_dict())
    with pytest.raises(RuntimeError, match="of 2 optimizer steps in a row"):
        restored.add(tmp_path, lambda: StepRecord([row()], {}), facts)
    restored.load_state_dict({})
    assert (restored.count, restored.in_a_row) == (0, 0)


# ---- whole runs ----


class PoisonFrom(Callback):
    """Gradients overflow from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_start(self, trainer, pl_module):
        weight = pl_module.model.get_input_embeddings().weight
        weight.register_hook(lambda gradient: gradient * (NAN if trainer.global_step >= self.step else 1.0))


@pytest.fixture
def sums(tmp_path):
    """Twelve rows of text."""
    file = tmp_path / "rows.jsonl"
    line = '{"problem": "Which? A. one B. two", "answer": "A", "reasoning": "One.", "problem_id": "%d"}\n'
    file.write_text("".join(line % number for number in range(12)))
    return file


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_run_ends_before_a_checkpoint_and_keeps_the_last_good_one(stage, tmp_path, sums):
    values = text_config(sums, stage)
    if stage == "rl":
        values["rollout"] = rollouts(sampling={"num_generations": 2, "max_completion_tokens": 3})
        values["model"]["mini_batches_per_rollout"] = 2
    poison = {"class_path": "tests.modules.test_skipped_steps.PoisonFrom", "init_args": {"step": 2}}
    values["trainer"]["callbacks"].append(poison)
    values["trainer"]["max_steps"] = 12
    values["checkpoint"] = {"every_n_train_steps": 1}
    with pytest.raises(RuntimeError, match="of 3 optimizer steps in a row"):
        run(tmp_path / "run", values)
    saved = checkpoint(tmp_path / "run")
    assert saved["global_step"] == 2
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert len(list((tmp_path / "run" / FOLDER).iterdir())) == 3
    logged = [value for (_, name), value in metrics(tmp_path / "run").items() if name == "train/nonfinite_steps"]
    assert float(logged[0]) == 0


class PoisonBatch(Callback):
    """The gradients of one batch overflow."""

    is_bad = False

    def on_train_start(self, trainer, pl_module):
        weight = pl_module.model.get_input_embeddings().weight
        weight.register_hook(lambda gradient: gradient * (NAN if self.is_bad else 1.0))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.is_bad = batch_idx == 1


def test_a_resumed_run_counts_as_the_uninterrupted_one(tmp_path, sums):
    values = text_config(sums)
    values["trainer"]["callbacks"].append({"class_path": "tests.modules.test_skipped_steps.PoisonBatch"})
    values["trainer"]["max_steps"] = 4
    values["checkpoint"] = {"every_n_train_steps": 2}
    whole = run(tmp_path / "whole", values)
    values["trainer"]["max_steps"] = 2
    parts = run(tmp_path / "parts", values)
    values["trainer"]["max_steps"] = 4
    run(parts, values, f"--ckpt_path={parts / 'checkpoints' / 'last.ckpt'}")
    one, two = checkpoint(whole), checkpoint(parts)
    assert one["global_step"] == two["global_step"] == 4
    assert one["skipped_steps"] == two["skipped_steps"] == {"count": 1, "in_a_row": 0}
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())
    assert metrics(whole) == metrics(parts)


# ---- several ranks ----


def on_every_rank(sp, folder):
    """One of two prompts is poisoned, which with sp 1 one rank alone has; then comes a good step."""
    family = text_family()
    policy = policy_of(family, algorithm=Algorithm())
    rank = int(torch.distributed.get_rank())
    batches = []
    for prompts in (poisoned_prompts(family, 2), text_prompts(family, 2)):
        ids = random_completions(family, [[5], [4]])
        pairs = zip(prompts, ids, strict=True)
        local = [dataclasses.replace(prompt, response=Continuation(answer)) for prompt, (answer,) in pairs]
        batches.append(Batch(local[rank::2] if sp == 1 else local))
    before = {}

    def start(policy):
        poison_embeddings(policy)
        before.update({name: value.clone() for name, value in local_weights(policy).items()})

    class AfterFirst(Callback):
        same = None

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                after = local_weights(pl_module)
                self.same = all(torch.equal(value, after[name]) for name, value in before.items())

    first = AfterFirst()
    strategy = MRSPStrategy(sp, timeout_s=600)
    seen = train(
        policy, *batches, before=start, strategy=strategy, devices=2, callbacks=[first], default_root_dir=folder
    )
    moved = any(not torch.equal(value, before[name]) for name, value in local_weights(policy).items())
    return first.same, moved, seen.steps, [each["train/nonfinite_steps"] for each in seen.metrics]


def local_weights(policy):
    return {name: value.to_local() for name, value in policy.model.state_dict().items()}


def both_grids(folder):
    return [on_every_rank(sp, f"{folder}/{sp}") for sp in (1, 2)]


def test_one_rank_with_a_bad_row_has_all_leave_the_step_out(tmp_path):
    for of_rank in run_distributed(both_grids, 2, str(tmp_path)):
        for unchanged, moved, steps, counts in of_rank:
            assert unchanged
            assert moved
            assert steps == 1
            assert counts == [1, 1]
    for sp in ("1", "2"):
        names = sorted(file.name for file in (tmp_path / sp / FOLDER).iterdir())
        assert names == [f"step_00000000_1_rank_{rank}.safetensors" for rank in range(2)]
    rows = [load_step_record(tmp_path / "1" / FOLDER / name).rows for name in names]
    assert [[each.id for each in of_rank] for of_rank in rows] == [["0"], ["poisoned"]]

"""Steps with a teacher: against stock models of policy and teacher, one forward per completion, in float64."""

import dataclasses
import math

import pytest
import torch

from longrl.algorithms import Algorithm, Distillation, InOrder, drop_uniform, no_advantage, token_mean
from longrl.models.lora import LoRASettings, to_checkpoint
from longrl.modules.distiller import Distiller
from longrl.modules.local_teacher import LocalTeacher
from longrl.modules.mini_batches import MiniBatch
from longrl.modules.offloaded_weights import OffloadedWeights
from longrl.modules.teachers import TeacherRun
from longrl.strategies.parallel import Parallel
from longrl.types import Batch
from tests.modules.test_policy import (
    BUDGETS,
    answers_of,
    batch_of,
    loss_by_hand,
    off_policy,
    policy_of,
    sampled,
    text_prompts,
    train,
    with_targets,
    with_turns,
)
from tests.teachers import (
    DISTILLATIONS,
    all_logits,
    teacher_logits,
    teacher_term,
    token_ids,
    told_more,
    wide_text_family,
    wide_text_teacher,
    wide_vl_family,
)
from tests.tiny import (
    assert_same_gradients,
    gradients,
    llama_family,
    mixed_prompts,
    plain_model,
    random_completions,
    row,
    text_family,
    vl_family,
)


def step_by_hand(policy, teacher, groups, distillation, temperature=1.0, old=None):
    """(loss, gradients, mean distance) of one step of GRPO and the teacher's term, in the mean over tokens."""
    prompts, answers = [group.prompt for group in groups], answers_of(groups)
    plain = plain_model(policy.model, policy.family)
    logits = all_logits(plain, prompts, answers) / temperature
    ids = token_ids(answers)
    logp = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    own = distillation.temperature or temperature
    dense = teacher_logits(teacher, prompts, answers, own)
    before = logp.detach() if old is None else old
    loss = loss_by_hand(logp, before, groups, weights="token_mean")
    if distillation.placement == "advantage":
        teacher_logp = dense.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        rewards = distillation.coef * (teacher_logp - before)
        distance = None
        loss = loss - ((logp - before).exp() * rewards).mean()
    else:
        distance = teacher_term(distillation, logits, dense, ids)
        weighed = distance
        if distillation.divergence == "sampled":  # another policy has drawn the tokens
            weighed = (logp - before).detach().exp().clamp(max=2.0) * distance
        loss = loss + distillation.coef * weighed.mean()
        distance = distance.mean().item()
    loss.backward()
    return loss.item(), gradients(plain), distance


# ---- one step ----


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", list(DISTILLATIONS))
def test_an_rl_step_with_a_teacher_is_the_loss_by_hand(name, temperature):
    """Of another width, whose head has more rows; whatever the micro-batches. It reads every group once."""
    distillation = DISTILLATIONS[name]
    policy = policy_of(text_family())
    policy.configure_model()
    groups = sampled(policy.family, text_prompts(policy.family))
    teacher = wide_text_teacher()
    loss, expected, distance = step_by_hand(policy, teacher, groups, distillation, temperature)
    for budget in BUDGETS.values():
        options = {"teacher": wide_text_teacher(), "distillation": distillation}
        policy = policy_of(
            text_family(), algorithm=Algorithm(token_weights=token_mean), max_tokens_per_micro_batch=budget, **options
        )
        policy.temperature = temperature
        seen = train(policy, batch_of(policy, groups))
        assert seen.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert_same_gradients(seen.gradients[0], expected, 2e-5)
        if distance is not None and name != "sampled":
            assert seen.metrics[0]["train/teacher_kl"] == pytest.approx(distance, rel=1e-5)
        assert seen.metrics[0]["train/teacher_share"] == pytest.approx(1.0)
    assert seen.metrics[0]["train/teacher_passes_per_group"] == 1
    assert policy.has_signal
    assert policy.phases.collect()["teacher"] > 0
    assert policy.teaching is None


@pytest.mark.parametrize("name", ["reverse", "top", "advantage"])
@pytest.mark.parametrize("views", [False, True])
def test_a_teacher_of_videos_encodes_them_itself_and_may_be_shown_others(views, name):
    """More frames in a longer prompt of its own, for some groups; completions are shown videos between their turns."""
    distillation = DISTILLATIONS[name]
    policy = policy_of(vl_family())
    policy.configure_model()
    groups = sampled(policy.family, mixed_prompts(policy.family))
    groups = with_turns(policy.family, groups)
    if views:
        prompts = told_more([group.prompt for group in groups])
        groups = [dataclasses.replace(group, prompt=prompt) for group, prompt in zip(groups, prompts, strict=True)]
    teacher = LocalTeacher(wide_vl_family())
    loss, expected, _ = step_by_hand(policy, teacher, groups, distillation)
    for budget in (260, 10_000):
        algorithm = Algorithm(token_weights=token_mean)
        options = {"teacher": LocalTeacher(wide_vl_family(), offload=True), "distillation": distillation}
        policy = policy_of(vl_family(), algorithm=algorithm, max_tokens_per_micro_batch=budget, **options)
        seen = train(policy, batch_of(policy, groups))
        assert seen.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert_same_gradients(seen.gradients[0], expected, 2e-5)


@pytest.mark.parametrize("name", ["forward", "reverse", "jensen", "top"])
def test_the_sft_stage_learns_a_teachers_distributions_of_stored_texts(name):
    distillation = DISTILLATIONS[name]
    policy = policy_of(text_family(), teacher=wide_text_teacher(), distillation=distillation)
    policy.configure_model()
    prompts = with_targets(text_prompts(policy.family))
    answers = [[prompt.response] for prompt in prompts]
    plain = plain_model(policy.model, policy.family)
    logits = all_logits(plain, prompts, answers)
    ids = token_ids(answers)
    dense = teacher_logits(wide_text_teacher(), prompts, answers, distillation.temperature or 1.0)
    distance = teacher_term(distillation, logits, dense, ids).mean()
    text = -logits.log_softmax(-1).gather(-1, ids[:, None]).mean()
    loss = distillation.sft_coef * text + distillation.coef * distance
    loss.backward()
    seen = train(policy, Batch(prompts))
    assert seen.metrics[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert seen.metrics[0]["train/teacher_kl"] == pytest.approx(distance.item(), rel=1e-5)
    assert seen.metrics[0]["train/teacher_passes_per_group"] == 1
    assert_same_gradients(seen.gradients[0], gradients(plain), 2e-5)


def test_distillation_alone_needs_no_rewards_and_has_a_signal():
    """Distances shrink; equal rewards teach nothing, and the step is not taken for one without signal."""
    algorithm = Algorithm(advantage=no_advantage, token_weights=token_mean)
    policy = policy_of(text_family(), algorithm=algorithm, teacher=wide_text_teacher())
    policy.optimizer_settings = dataclasses.replace(policy.optimizer_settings, lr=1e-2)
    equal = torch.ones(3, 3)
    batch = batch_of(policy, sampled(policy.family, text_prompts(policy.family), rewards=equal))
    seen = train(policy, *[batch] * 6)
    distances = [metrics["train/teacher_kl"] for metrics in seen.metrics]
    assert distances[-1] < 0.9 * distances[0]
    assert seen.metrics[0]["train/loss"] == pytest.approx(distances[0])
    assert policy.has_signal


def test_mini_batches_have_the_teachers_tokens_of_their_groups():
    """Two optimizer steps that change nothing are the halves of one."""
    still = {"optimizer": dataclasses.replace(policy_of(text_family()).optimizer_settings, lr=0.0)}
    seen = []
    for count in (1, 3):
        policy = policy_of(text_family(), teacher=wide_text_teacher(), mini_batches_per_rollout=count, **still)
        groups = sampled(policy.family, text_prompts(policy.family))
        seen.append(train(policy, batch_of(policy, groups)))
    halves = seen[1].gradients
    for name, grad in seen[0].gradients[0].items():
        torch.testing.assert_close(sum(part[name] for part in halves) / 3, grad, rtol=1e-4, atol=1e-6)
    assert seen[1].metrics[0]["train/teacher_kl"] == pytest.approx(seen[0].metrics[0]["train/teacher_kl"], rel=1e-5)


def test_a_loss_of_sampled_tokens_is_weighed_in_later_updates_and_of_a_decoupled_objective():
    """By the ratio to the policy that drew them: the one before the rollout's updates, or the sampler of old tokens."""
    old_logp = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    batch = MiniBatch(
        groups=(),
        advantages=torch.zeros(4),
        old_logp=old_logp,
        ref_logp=None,
        sampler_logp=torch.tensor([-1.5, -2.5, math.nan, -4.5]),
        staleness=torch.tensor([0, 1, 1, 2]),
        weights=torch.ones(1),
        nonfinite=torch.zeros(1, dtype=torch.bool),
    )
    drawn = batch.drawn_logp
    assert drawn.tolist() == [-1.0, -2.5, -3.0, -4.5]
    assert dataclasses.replace(batch, old_logp=None).drawn_logp is None
    logp = torch.tensor([-1.0, -3.5, -2.0, -4.5], requires_grad=True)
    losses = Distillation("sampled").of_samples(logp, torch.zeros(4), drawn, cap=2.0)
    assert losses.tolist() == pytest.approx([0.5, math.exp(-1) * 6.125, 2 * 2.0, 10.125])
    losses.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-1.0, -3.5 * math.exp(-1), -4.0, -4.5])


# ---- several teachers ----


def test_the_first_teacher_of_a_rows_task_scores_its_group_and_others_have_none():
    """A task each, and one that nobody teaches; the term is that of each on its own."""
    distillation = DISTILLATIONS["reverse"]
    family = text_family()
    tasks = ["math", "ocr", "exact", "math"]
    prompts = [
        family.render(dataclasses.replace(row(str(index)), task=task), "Which one? " * (1 + index))
        for index, task in enumerate(tasks)
    ]
    rewards = torch.rand(4, 3, generator=torch.Generator().manual_seed(2))
    first = sampled(family, prompts[:3], rewards=rewards)
    groups = [*first, dataclasses.replace(first[0], prompt=prompts[3], rewards=rewards[3])]

    def teachers():
        of_math = wide_text_teacher(tasks=["math"])
        of_others = LocalTeacher(text_family("qwen3", init_seed=8), tasks=["ocr", "math"])
        return [of_math, of_others]

    algorithm = Algorithm(token_weights=token_mean)
    policy = policy_of(family, algorithm=algorithm, teacher=teachers(), distillation=distillation)
    policy.configure_model()
    plain = plain_model(policy.model, family)
    answers = answers_of(groups)
    logits = all_logits(plain, prompts, answers)
    ids = token_ids(answers)
    logp = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    loss = loss_by_hand(logp, logp.detach(), groups, weights="token_mean")
    lengths = [sum(len(one.token_ids) for one in group) for group in answers]
    distances = []
    parts = zip(prompts, answers, logits.split(lengths), ids.split(lengths), strict=True)
    for number, (prompt, group, own_logits, own_ids) in zip([0, 1, None, 0], parts, strict=True):
        if number is not None:
            dense = teacher_logits(teachers()[number], [prompt], [group])
            distances.append(teacher_term(distillation, own_logits, dense, own_ids))
    together = torch.cat(distances)
    loss = loss + distillation.coef * together.sum() / sum(lengths)
    loss.backward()
    for budget in (80, 10_000):
        policy = policy_of(
            family, algorithm=algorithm, teacher=teachers(), distillation=distillation,
            max_tokens_per_micro_batch=budget,
        )  # fmt: skip
        seen = train(policy, batch_of(policy, groups))
        assert seen.metrics[0]["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert seen.metrics[0]["train/teacher_kl"] == pytest.approx(together.mean().item(), rel=1e-5)
        assert seen.metrics[0]["train/teacher_share"] == pytest.approx(len(together) / sum(lengths))
        assert_same_gradients(seen.gradients[0], gradients(plain), 2e-5)
    assert seen.metrics[0]["train/teacher_passes_per_group"] == 1


def test_groups_without_a_teacher_train_as_without_any():
    groups = sampled(text_family(), text_prompts(text_family()))
    plain, taught = (
        policy_of(text_family(), **options) for options in ({}, {"teacher": wide_text_teacher(tasks=["math"])})
    )
    seen, with_teacher = (train(policy, batch_of(policy, groups)) for policy in (plain, taught))
    assert_same_gradients(with_teacher.gradients[0], seen.gradients[0], 1e-7)
    assert with_teacher.metrics[0]["train/teacher_share"] == 0
    assert "train/teacher_passes_per_group" not in with_teacher.metrics[0]


# ---- weights ----


def test_a_teacher_is_in_no_checkpoint_and_is_not_trained():
    policy = policy_of(text_family(), teacher=wide_text_teacher())
    groups = sampled(policy.family, text_prompts(policy.family))
    train(policy, batch_of(policy, groups))
    model = policy.distiller.teachers[0].model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {name.split(".")[0] for name in policy.state_dict()} == {"model"}
    numbers = sum(value.numel() for value in policy.state_dict().values())
    plain = policy_of(text_family())
    plain.configure_model()
    assert numbers == sum(value.numel() for value in plain.state_dict().values())


def test_a_teachers_weights_are_a_runs_with_its_adapters_merged(tmp_path):
    """Given as the checkpoint of a run with LoRA, whose adapters do something."""
    learned = policy_of(wide_text_family(lora=LoRASettings(rank=2)))
    learned.configure_model()
    with torch.no_grad():
        for name, weight in learned.model.named_parameters():
            if "lora_B" in name:
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": learned.state_dict(), "lora": to_checkpoint(learned.family.lora)}, file)

    prompts = text_prompts(text_family())
    answers = random_completions(text_family(), [[3, 7], [5, 1], [2, 9]])
    teacher = wide_text_teacher(init_from=str(file))
    teacher.start(TeacherRun(text_family(), Distillation("sampled"), Parallel(), 100, torch.device("cpu")))
    plain = wide_text_teacher()
    plain.start(teacher._run)
    said = teacher.score(prompts, answers, 0.7)
    torch.testing.assert_close(said.logp, learned.score(learned.policy, prompts, answers, {}, 0.7))
    assert (said.logp - plain.score(prompts, answers, 0.7).logp).abs().max() > 1e-2
    assert said.hidden is None


def test_offloaded_weights_are_the_hosts_own_behind_a_pass():
    model = torch.nn.Linear(2, 3)
    before = [weight.data_ptr() for weight in model.parameters()]
    offloaded = OffloadedWeights(model, torch.device("cpu"))
    with pytest.raises(KeyError), offloaded.on_device():
        raise KeyError
    assert [weight.data_ptr() for weight in model.parameters()] == before


# ---- bad input ----


def setup_of(family, stage="rl", algorithm=None, **options):
    distiller = Distiller.of(options["teacher"], options.get("distillation"))
    distiller.setup(family, algorithm or Algorithm(), stage)


def test_another_tokenizer_is_refused_with_both_folders():
    teacher = LocalTeacher(llama_family())
    family = text_family()
    family.tokenizer.add_tokens(["one more"])
    with pytest.raises(ValueError, match="1 of .* tokens of .*longrl-text-.*the policy.*longrl-llama-.*missing"):
        setup_of(family, teacher=teacher)


def test_other_end_tokens_are_refused():
    teacher = wide_text_teacher()
    teacher.family.__dict__["end_token_ids"] = (1,)
    with pytest.raises(ValueError, match="needs the policy's end tokens"):
        setup_of(text_family(), teacher=teacher)


def test_adapters_of_a_teacher_are_its_checkpoints():
    with pytest.raises(ValueError, match="a teacher is not trained"):
        LocalTeacher(wide_text_family(lora=LoRASettings()))


def test_a_source_that_is_not_there_is_found_before_weights_are_loaded():
    with pytest.raises(ValueError, match=r"model\.teacher\.init_args\.init_from='\./nowhere' does not exist"):
        setup_of(text_family(), teacher=wide_text_teacher(init_from="./nowhere"))


def test_stored_texts_are_not_the_policys_samples():
    sampled_alone = {"teacher": wide_text_teacher(), "distillation": Distillation("sampled")}
    with pytest.raises(ValueError, match="data.stage=sft trains on stored ones"):
        setup_of(text_family(), "sft", **sampled_alone)
    setup_of(text_family(), "rl", **sampled_alone)
    with pytest.raises(ValueError, match="data.stage=preference trains on pairs"):
        setup_of(text_family(), "preference", teacher=wide_text_teacher())


def test_a_task_that_no_row_has_is_refused():
    distiller = Distiller([wide_text_teacher(tasks=["math", "maths"])], Distillation())
    with pytest.raises(ValueError, match=r"tasks names maths, but the rows of data\.train have the tasks math, ocr"):
        distiller.check_tasks([row(task="math"), row(task="ocr")])
    distiller.check_tasks([])


def test_a_selection_by_rewards_is_said_to_leave_out_what_could_be_taught(caplog):
    setup_of(text_family(), algorithm=Algorithm(select=InOrder([drop_uniform])), teacher=wide_text_teacher())
    assert "drop_uniform leaves out groups" in caplog.text


def test_how_to_distil_without_a_teacher_is_refused():
    with pytest.raises(ValueError, match=r"model\.distillation needs a teacher, got none"):
        policy_of(text_family(), distillation=Distillation())
    with pytest.raises(ValueError, match="tasks must name a task, got none"):
        wide_text_teacher(tasks=[])


def test_media_that_a_teacher_reads_otherwise_need_prompts_of_its_own():
    policy = policy_of(vl_family(), teacher=wide_text_teacher())
    groups = sampled(policy.family, mixed_prompts(policy.family))
    with pytest.raises(ValueError, match="TextFamily and reads media otherwise than the policy's Qwen2_5_VLFamily"):
        train(policy, batch_of(policy, groups))


def test_a_text_teacher_reads_what_a_policy_of_videos_was_asked_in_words():
    distillation = DISTILLATIONS["reverse"]
    policy = policy_of(vl_family())
    policy.configure_model()
    groups = sampled(policy.family, text_prompts(policy.family))
    algorithm = Algorithm(token_weights=token_mean)
    loss, expected, _ = step_by_hand(policy, wide_text_teacher(), groups, distillation)
    policy = policy_of(
        vl_family(freeze_vision_encoder=True), algorithm=algorithm, teacher=wide_text_teacher(),
        distillation=distillation,
    )  # fmt: skip
    seen = train(policy, batch_of(policy, groups))
    assert seen.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(seen.gradients[0], expected, 2e-5)


@pytest.mark.parametrize(("name", "spread"), [("advantage", 0.05), ("sampled", 0.7)])
def test_tokens_of_older_weights_count_by_how_likely_they_are_now(name, spread):
    """Of carried-over groups rewards are taken at the sampler's policy, around which the ratio is clipped as that of
    other advantages; a loss of sampled tokens is weighed by the ratio to it, at most 2."""
    distillation = DISTILLATIONS[name]
    policy = policy_of(text_family())
    policy.configure_model()
    old = off_policy(policy, sampled(policy.family, text_prompts(policy.family)), spread=spread)
    groups = sampled(policy.family, text_prompts(policy.family), old, carried_over=True)
    loss, expected, _ = step_by_hand(policy, wide_text_teacher(), groups, distillation, old=old.double())
    policy = policy_of(
        text_family(), algorithm=Algorithm(token_weights=token_mean), teacher=wide_text_teacher(),
        distillation=distillation,
    )  # fmt: skip
    seen = train(policy, batch_of(policy, groups))
    assert seen.metrics[0]["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(seen.gradients[0], expected, 2e-5)

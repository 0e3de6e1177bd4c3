"""The contract of MR-SP: any grid of ranks gives the loss and every gradient of one plain process.

The oracle is a stock transformers model on one process, one forward with all pixels per completion, and the loss
written out by hand (tests/modules/test_policy.py).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from longrl.algorithms import Algorithm, MovingReference, token_mean
from longrl.models.lora import LoRASettings
from longrl.modules.local_teacher import LocalTeacher
from longrl.modules.policy import all_media
from longrl.strategies.mr_sp import MRSPStrategy
from longrl.testing.sample_turns import random_turns
from longrl.types import FULL_SHARD, Batch, FrameShard
from tests.distributed import run_distributed
from tests.families import proves
from tests.modules import test_partial_rollouts, test_preference_step
from tests.modules.test_moving_state import bonus_by_hand
from tests.modules.test_policy import (
    answers_of,
    disturb_text,
    gradients_by_hand,
    policy_of,
    sampled,
    tokens_of,
    train,
    with_targets,
    with_turns,
)
from tests.teachers import DISTILLATIONS, all_logits, teacher_logits, teacher_term, token_ids, told_more, wide_vl_family
from tests.tiny import (
    answers_with_experts,
    assert_same_gradients,
    force_experts,
    frames,
    gradients,
    held,
    internvl_family,
    internvl_prompts,
    llama_family,
    mixed_prompts,
    nvila_family,
    omni_family,
    omni_prompts,
    peft_model,
    plain_model,
    qwen2_vl_family,
    qwen3_5_family,
    qwen3_5_text_family,
    qwen3_omni_family,
    qwen3_vl_family,
    row,
    separate_logps,
    text_family,
    vila_family,
    vl_family,
)

VISUAL = (
    "model.visual", "vision_tower", "mm_projector", "visual", "audio_tower", "model.vision_tower",
    "model.multi_modal_projector",
)  # fmt: skip
BUDGETS = {"one completion": 57, "all": 10_000}


FAMILIES = {
    "qwen2.5-vl": vl_family,
    "qwen2-vl": qwen2_vl_family,
    "qwen3-vl": qwen3_vl_family,
    "qwen2.5-omni": omni_family,
    "qwen3-omni": qwen3_omni_family,
    "qwen2.5-omni, vision frozen": lambda freeze_vision_encoder, **kwargs: omni_family(
        freeze_vision_encoder=True, freeze_audio_encoder=freeze_vision_encoder, **kwargs
    ),
    "qwen3.5": qwen3_5_family,
    "qwen3.5 experts": functools.partial(qwen3_5_family, experts=True),
    "qwen3.5 text": lambda freeze_vision_encoder, **kwargs: qwen3_5_text_family(**kwargs),
    "qwen3-vl experts": functools.partial(qwen3_vl_family, experts=True),
    "nvila": lambda lora, offload_checkpoints, mlp_chunk_tokens, freeze_vision_encoder, **kwargs: nvila_family(
        freeze_vision_encoder=freeze_vision_encoder, freeze_projector=freeze_vision_encoder, **kwargs
    ),
    "internvl3.5": lambda freeze_vision_encoder, **kwargs: internvl_family(
        freeze_vision_encoder=freeze_vision_encoder, freeze_projector=freeze_vision_encoder, **kwargs
    ),
    "qwen2.5 text": lambda freeze_vision_encoder, **kwargs: text_family("qwen2", **kwargs),
    "qwen3 text": lambda freeze_vision_encoder, **kwargs: text_family("qwen3", **kwargs),
    "llama text": lambda freeze_vision_encoder, **kwargs: llama_family(**kwargs),
}


@functools.cache
def made(make, **options):
    return make(**options)


@dataclasses.dataclass(frozen=True)
class Case:
    """A grid, and what is trained on it."""

    sp: int | str = 1
    budget: int = 10_000
    checkpointing: bool = False
    freeze: bool = False
    prompts: str = "mixed"
    kl: bool = False
    mini_batches: int = 1
    sft: bool = False
    chunks: int = 1
    replicas: int = 1
    lora: bool = False
    vila_pool: int | str | None = None
    """Frames VILA pools; None is Qwen2.5-VL."""
    freeze_vision_encoder: bool = False
    """Of VILA's encoder alone: its projector trains."""
    model: str = "qwen2.5-vl"
    offload: bool = False
    mlp_chunk: int | None = None
    compiled: bool = False
    replay: bool = False
    """Of a mixture: by experts drawn at random."""
    turns: bool = False
    """Completions are shown text and media between their turns."""
    cut: str | None = None
    """The objective on completions that several weights have drawn, of tests/modules/test_partial_rollouts.py."""
    teacher: str | None = None
    """How a wider model teaches, of tests/teachers.py, that reads other prompts for some groups."""
    offload_teacher: bool = False
    pairs: str | None = None
    """The objective on pairs of answers, of tests/modules/test_preference_step.py."""
    entropy: float = 0.0
    """Coefficient of an entropy bonus."""
    moving: bool = False
    """The reference is one that will move, kept as numbers that change places with the policy's."""

    def family(self):
        """One for all cases of its options: what it has read of its folder, a rank reads once."""
        if self.vila_pool is not None:
            return made(
                vila_family,
                freeze_vision_encoder=self.freeze or self.freeze_vision_encoder,
                freeze_projector=self.freeze,
                pool_frames=self.vila_pool,
                gradient_checkpointing=self.checkpointing,
            )
        lora = LoRASettings(rank=3) if self.lora else None  # fewer rows than some ranks
        memory = {"offload_checkpoints": self.offload, "mlp_chunk_tokens": self.mlp_chunk}
        if self.compiled:
            memory["compile_layers"] = True
        options = {"freeze_vision_encoder": self.freeze, "gradient_checkpointing": self.checkpointing, "lora": lora}
        return made(FAMILIES[self.model], **options, **memory)

    def algorithm(self):
        if self.cut:
            return dataclasses.replace(test_partial_rollouts.objective(self.cut), token_weights=token_mean)
        return Algorithm(
            token_weights=token_mean,
            kl_coef=0.3 if self.kl else 0.0,
            moving_reference=MovingReference() if self.moving else None,
            entropy_coef=self.entropy,
        )

    def distilled(self):
        """Options of a policy."""
        if self.teacher is None:
            return {}
        teacher = LocalTeacher(wide_vl_family(), offload=self.offload_teacher)
        return {"teacher": teacher, "distillation": DISTILLATIONS[self.teacher]}

    def groups(self, shard=FULL_SHARD, pixels_left_out=False):
        family = self.family()
        groups = sampled(family, self.rendered(shard))
        if self.cut:
            policy = policy_of(family)
            policy.configure_model()
            groups = test_partial_rollouts.drawn_groups(policy.model, family)
        if self.turns:
            groups = with_turns(family, groups, pixels_left_out)
        if self.replay:
            prompts = [group.prompt for group in groups]
            answers = answers_with_experts(prompts, answers_of(groups), shape=(3, 2), num_experts=4)
            for group, experts in zip(groups, answers, strict=True):
                group.completions = [
                    dataclasses.replace(one, experts=two.experts, prompt_experts=two.prompt_experts)
                    for one, two in zip(group.completions, experts, strict=True)
                ]
        return groups

    def rendered(self, shard=FULL_SHARD):
        """The prompts, some with a teacher's view."""
        prompts = PROMPTS[self.prompts](self.family(), shard)
        return prompts if self.teacher is None else told_more(prompts, shard)


def text_prompts(family, shard):
    return [family.render(row(str(i)), "Which one? " * (1 + 2 * i)) for i in range(3)]


def one_video(family, shard):
    """Four questions on one video of one temporal cell, shorter than most teams are large."""
    clip = held(frames(2, 60, 90, "short"), shard, family.temporal_patch_size)
    return [family.render(row(str(i)), "What? " * i, [clip]) for i in range(3)]


def single(family, shard):
    """Fewer prompts than teams: a rank has nothing at all."""
    return mixed_prompts(family, shard)[:1]


def omni_sound(family, shard):
    """No rank has a picture; a sound of four windows and a text."""
    return omni_prompts(family, shard)[1:]


PROMPTS = {
    "omni": omni_prompts,
    "internvl": internvl_prompts,
    "omni sound": omni_sound,
    "single": single,
    "mixed": mixed_prompts,
    "text": text_prompts,
    "one video": one_video,
}


class Encode(Callback):
    """Fills in features, as the rollout callback does."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        media = all_media(batch.prompts, answers_of(batch.groups))
        batch.features = pl_module.features.get_or_encode(pl_module.model, media)


def on_every_rank(cases: list[Case], devices: int) -> list[Any]:
    return [one_step(case, devices) for case in cases]


def one_step(case: Case, devices: int) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    sp_group = devices if case.sp == "auto" else case.sp
    rank = int(torch.distributed.get_rank())
    data, of = rank // sp_group, devices // sp_group
    groups = case.groups(FrameShard(rank % sp_group, sp_group), pixels_left_out=True)[data::of]
    prompts = [group.prompt for group in groups]
    if case.sft or case.pairs:
        batch = Batch(taught(case, FrameShard(rank % sp_group, sp_group))[data::of])
    else:
        batch = Batch(prompts, groups=groups)
    if case.compiled:
        torch.compile = functools.partial(torch.compile, backend="eager")  # in this rank's process alone
    policy = policy_of(
        case.family(),
        algorithm=case.algorithm(),
        max_tokens_per_micro_batch=case.budget,
        mini_batches_per_rollout=case.mini_batches,
        preference=test_preference_step.OBJECTIVES.get(case.pairs),
        **case.distilled(),
    )
    policy.reward_shift.add(0.3, 4)
    policy.on_before_optimizer_step = forget_gradients
    strategy = MRSPStrategy(case.sp, num_replicas=case.replicas, num_gather_chunks=case.chunks, timeout_s=600)
    seen = train(
        policy,
        batch,
        before=disturb_sharded if case.kl or case.lora or case.pairs else lambda policy: None,
        strategy=strategy,
        devices=devices,
        callbacks=[] if case.sft or case.pairs else [Encode()],
    )
    return seen.metrics[-1] | {"shift": policy.reward_shift.total}, seen.gradients[-1]


def forget_gradients(optimizer) -> None:
    """Behind the callback that keeps them: a step that moves nothing, for Adam would plan each sum over shards anew."""
    optimizer.zero_grad()


def taught(case: Case, shard: FrameShard):
    """Prompts with their targets."""
    family = case.family()
    if case.pairs:
        return test_preference_step.with_pairs(family, case.rendered(shard))
    prompts = with_targets(case.rendered(shard))
    if not case.turns:
        return prompts
    targets = random_turns(family, prompts, shard)
    return [dataclasses.replace(prompt, response=of[-1]) for prompt, of in zip(prompts, targets, strict=True)]


def disturb_sharded(policy):
    """As `disturb_text`, on shards: every rank draws the whole and keeps its own. Of adapters, these alone."""
    from torch.distributed.tensor import distribute_tensor

    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "visual" not in name and "audio_tower" not in name and parameter.requires_grad:
                noise = 0.02 * torch.randn(parameter.shape, generator=generator)
                parameter += distribute_tensor(noise, parameter.device_mesh, parameter.placements)


def by_hand(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one plain process, which knows no grid and saves no memory."""
    plain = {name: getattr(Case, name) for name in HOW}
    return of_one_process(dataclasses.replace(case, **plain))


HOW = (
    "sp", "budget", "checkpointing", "chunks", "replicas", "offload", "mlp_chunk", "compiled", "offload_teacher",
    "moving",
)  # fmt: skip
"""Fields of a case that change neither loss nor gradients."""


@functools.cache
def of_one_process(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    family = case.family()
    policy = policy_of(family)
    policy.configure_model()
    groups = case.groups()
    options: dict[str, Any] = {}
    stock = peft_model if case.lora else plain_model
    plain = stock(policy.model, family)
    if case.kl:
        with torch.no_grad():
            prompts = [group.prompt for group in groups]
            options = {"reference": separate_logps(plain, prompts, answers_of(groups)), "kl_coef": 0.3}
    if case.pairs:
        with torch.no_grad():
            prompts = taught(case, FULL_SHARD)
            reference = separate_logps(plain, prompts, test_preference_step.answered(prompts))
    if case.kl or case.lora or case.pairs:
        disturb_text(policy)
        plain = stock(policy.model, family)
    if case.replay:  # the reference above chose its own
        force_experts(plain, [group.prompt for group in groups], [group.completions for group in groups])
    if case.sft:
        prompts = taught(case, FULL_SHARD)
        logp = separate_logps(plain, prompts, [[prompt.response] for prompt in prompts])
        (-logp.mean()).backward()
        loss = float(-logp.mean())
        grads = gradients(plain)
    elif case.pairs:
        logp = separate_logps(plain, prompts, test_preference_step.answered(prompts))
        total, _ = test_preference_step.loss_by_hand(case.pairs, logp, reference, prompts, shift=0.3)
        total.backward()
        loss = total.item()
        grads = gradients(plain)
    elif case.cut:
        loss, grads = test_partial_rollouts.gradients_by_hand(plain, None, groups, case.cut, token_mean=True)
    elif case.entropy:
        loss, grads, _ = bonus_by_hand(plain, groups, "token_mean", case.entropy)
    else:
        loss, grads = gradients_by_hand(plain, groups, weights="token_mean", **options)
    if case.teacher:
        loss, grads = with_teacher_by_hand(case, plain, loss)
    if case.freeze:
        grads = {name: grad for name, grad in grads.items() if not name.startswith(VISUAL)}
    if case.freeze_vision_encoder:
        grads = {name: grad for name, grad in grads.items() if not name.startswith("vision_tower")}
    if case.model.endswith("vision frozen"):
        grads = {name: grad for name, grad in grads.items() if not name.startswith("visual")}
    return loss, grads


def with_teacher_by_hand(case: Case, plain, loss: float) -> tuple[float, dict[str, torch.Tensor]]:
    """Adds the teacher's term, the mean over tokens, to a loss whose gradients the model has."""
    distillation = DISTILLATIONS[case.teacher]
    if case.sft:
        prompts = taught(case, FULL_SHARD)
        answers = [[prompt.response] for prompt in prompts]
        loss *= distillation.sft_coef
        for parameter in plain.parameters():
            if parameter.grad is not None:
                parameter.grad *= distillation.sft_coef
    else:
        groups = case.groups()
        prompts = [group.prompt for group in groups]
        answers = answers_of(groups)
    dense = teacher_logits(case.distilled()["teacher"], prompts, answers, distillation.temperature or 1.0)
    losses = teacher_term(distillation, all_logits(plain, prompts, answers), dense, token_ids(answers))
    term = distillation.coef * losses.mean()
    term.backward()
    return loss + term.item(), gradients(plain)


def check(cases: list[Case], devices: int) -> list[Any]:
    found = run_distributed(on_every_rank, devices, cases, devices)
    for place, case in enumerate(cases):
        loss, expected = by_hand(case)
        for metrics, grads in (rank[place] for rank in found):
            assert metrics["train/loss"] == pytest.approx(loss, rel=1e-4, abs=2e-6), case
            # A sharded encoder also runs where there is nothing for it, and then has zeros.
            used = {name: grad for name, grad in grads.items() if name in expected or grad.any()}
            assert_same_gradients(used, expected, 1e-5)
    return found


CUT = ((2, "coupled, truncated token"), (2, "masked sequence"), (1, "truncated token"))
GRIDS = {1: [1], 2: [1, 2], 4: [2, 4], 8: [4]}


@proves("SP", "qwen2.5-vl")
@pytest.mark.parametrize("devices", list(GRIDS))
def test_any_grid_gives_the_loss_and_gradients_of_one_process(devices):
    """Videos of uneven length at any offset, an image, text; frozen or trainable encoder; packed or not; recomputed."""
    cases = [
        Case(sp=sp, budget=budget, checkpointing=checkpointing, freeze=freeze)
        for sp in GRIDS[devices]
        for budget in BUDGETS.values()
        for checkpointing in (False, True)
        for freeze in (False, True)
    ]
    check(cases, devices)


@pytest.mark.parametrize("devices", [2, 3])
def test_what_completions_are_shown_is_shared(devices):
    """Groups of no, one and three observations; whole media of completions, in SFT shards; all that saves memory."""
    memory = {"checkpointing": True, "mlp_chunk": 7, "offload": True}
    grids = {
        2: [
            Case(budget=260, kl=True, freeze=True, turns=True),
            Case(sp=2, budget=150, turns=True, **memory),
            Case(sp=2, sft=True, turns=True),
            Case(model="qwen3-vl experts", sp=2, replay=True, turns=True),
        ],
        3: [
            Case(sp=3, budget=100, kl=True, turns=True),
            Case(model="qwen3-vl", sp=3, sft=True, freeze=True, turns=True),
        ],
    }
    check(grids[devices], devices)


@pytest.mark.parametrize("devices", [2])
def test_pairs_are_whole_wherever_their_rows_are(devices):
    """Sums over answers are of all ranks that share a sequence; a rank without a pair; adapters off; a mean reward."""
    cases = [
        Case(sp=1, pairs="mpo", budget=120),
        Case(sp=2, pairs="mpo", budget=60, freeze=True, checkpointing=True),
        Case(sp=2, pairs="dpo", prompts="text", model="qwen2.5 text", lora=True, budget=40),
        Case(sp=1, pairs="ipo", prompts="text", model="qwen2.5 text", budget=90),
        Case(sp="auto", pairs="simpo", freeze=True, budget=80),
    ]
    found = check(cases, devices)
    one, other = (rank[0][0]["shift"] for rank in found)
    assert one == other
    assert one == pytest.approx(found[0][1][0]["shift"], rel=1e-4)


@proves("SP", "qwen2.5", "qwen3", "llama3")
def test_text_is_shared():
    cases = [
        Case(model=model, sp=sp, prompts="text", budget=budget, checkpointing=checkpointing, kl=checkpointing)
        for model in ("qwen2.5 text", "qwen3 text", "llama text")
        for sp, budget, checkpointing in ((2, 57, False), (2, 10_000, True))
    ]
    cases += [Case(model="qwen2.5 text", sp=sp, prompts="text", budget=57, cut=cut) for sp, cut in CUT]
    cases += [Case(model="qwen2.5 text", sp=sp, prompts="text", budget=57, entropy=0.7) for sp in (1, 2)]
    check(cases, 2)


@pytest.mark.parametrize("devices", [2, 4])
def test_a_teacher_teaches_the_same_on_any_grid(devices):
    """Its distances over the whole vocabulary, over a part, and of samples; sharded, and offloaded; packed and not."""
    grids = {
        2: [
            Case(sp=2, teacher="reverse", budget=60),
            Case(sp=1, teacher="jensen", freeze=True, offload_teacher=True),
            Case(sp=2, teacher="forward", sft=True, freeze=True),
            Case(sp=2, teacher="top", freeze=True, turns=True, budget=200),
            Case(sp=1, teacher="sampled", prompts="single", freeze=True),
        ],
        4: [
            Case(sp="auto", teacher="reverse", freeze=True, budget=40),
            Case(sp=2, teacher="top", sft=True, freeze=True, replicas=2),
        ],
    }
    for rank in check(grids[devices], devices):
        for case, (metrics, _) in zip(grids[devices], rank, strict=True):
            passes = metrics["train/teacher_passes_per_group"]
            assert passes == 1 if case.budget == 10_000 else passes >= 1


def test_a_reference_that_moves_is_sharded_with_what_trains():
    """With an encoder that trains too, and adapters that have a reference of their own."""
    check([Case(sp=1, kl=True, moving=True), Case(sp=2, kl=True, moving=True, lora=True, freeze=True, budget=57)], 2)


@proves("SP", "nvila", "longvila-r1")
@pytest.mark.parametrize("devices", [3])
def test_vila_is_shared_by_pooled_frames(devices):
    """Everything frozen, the projector alone, and all of it trained; packed and not; an image of several scales."""
    cases = [
        Case(model="nvila", sp=devices, budget=150),
        Case(sp=devices, vila_pool=1, freeze=True, budget=110),
        Case(sp=devices, vila_pool=2, freeze_vision_encoder=True),
        Case(sp=devices, vila_pool="by_length", freeze_vision_encoder=True, kl=True),
        Case(sp=devices, vila_pool=2, checkpointing=True, chunks=2),
        Case(sp=1, vila_pool=1, freeze_vision_encoder=True, prompts="single"),
    ]
    check(cases, devices)


@proves("SP", "qwen2-vl")
def test_three_ranks_share_what_three_does_not_divide():
    older = [Case(model="qwen2-vl", sp=3, budget=70), Case(model="qwen2-vl", sp=3, checkpointing=True, chunks=2)]
    check([Case(sp=3, budget=70, kl=True, freeze=True), Case(sp=3, checkpointing=True, chunks=2), *older], 3)


@pytest.mark.parametrize("devices", [4])
def test_other_batches_on_other_grids(devices):
    cases = [
        case
        for sp in GRIDS[devices]
        for case in (
            Case(sp=sp, prompts="text"),
            Case(sp=sp, prompts="one video", chunks=3),  # ranks without a frame
            Case(sp=sp, prompts="mixed", kl=True, freeze=True, budget=100),
            Case(sp=sp, prompts="mixed", sft=True),
            Case(sp=sp, prompts="mixed", sft=True, budget=57, freeze=True),
            Case(sp=sp, prompts="mixed", replicas=2),
            Case(sp=sp, prompts="single"),
            Case(sp=sp, prompts="single", freeze=True, kl=True, budget=57),
        )
    ]
    check(cases, devices)


@proves("SP", "qwen3-vl", "qwen3-vl-moe")
@pytest.mark.parametrize("devices", [3])
def test_features_for_several_layers(devices):
    """DeepStack: every rank adds what belongs to its own rows."""
    cases = [
        Case(model="qwen3-vl", sp=devices),
        Case(model="qwen3-vl", sp=devices, budget=100, freeze=True, kl=True),
        Case(model="qwen3-vl", sp=devices, checkpointing=True, chunks=2),
        Case(model="qwen3-vl", sp=devices, prompts="one video"),
        Case(model="qwen3-vl", budget=200, prompts="single"),
        Case(model="qwen3-vl", sp=devices, sft=True, freeze=True, checkpointing=True),
        Case(model="qwen3-vl", sp=devices, lora=True, freeze=True),
        Case(model="qwen3-vl experts", sp=devices, budget=100),
    ]
    check(cases, devices)


def test_experts_are_replayed_on_any_grid():
    """Their rows are shared as all others; layers recomputed and in pieces; sharded experts; beside adapters."""
    model = {"model": "qwen3-vl experts", "replay": True}
    cases = [
        Case(sp=2, budget=100, kl=True, freeze=True, **model),
        Case(sp=2, checkpointing=True, mlp_chunk=7, **model),
        Case(sp=1, budget=250, checkpointing=True, offload=True, **model),
        Case(sp=2, lora=True, freeze=True, **model),
    ]
    found = check(cases, 2)
    # every row of the step counts once, whoever has it, and padding does not; 9 completions have a last token
    groups = cases[1].groups()
    num_rows = sum(len(group.prompt.input_ids) for group in groups)
    num_rows += sum(len(ids) for of_group in tokens_of(groups) for ids in of_group)
    for rank in found:
        assert rank[1][0]["train/router_replayed"] == pytest.approx(1 - 9 / num_rows)
        assert rank[1][0]["train/router_mismatch"] == pytest.approx(found[0][1][0]["train/router_mismatch"])


@proves("SP", "qwen2.5-omni", "qwen3-omni")
@pytest.mark.parametrize("devices", [3])
def test_sound_is_shared_by_windows(devices):
    """Two encoders, frozen and not; ranks and teams without a picture, or without a sound; tracks among videos."""
    cases = [
        Case(model="qwen2.5-omni", sp=devices, prompts="omni"),
        Case(model="qwen2.5-omni", sp=devices, prompts="omni", freeze=True, kl=True, budget=400),
        Case(model="qwen2.5-omni", sp=devices, prompts="omni", checkpointing=True, chunks=2),
        Case(model="qwen2.5-omni", prompts="omni", budget=400),
        Case(model="qwen2.5-omni", sp=devices, prompts="omni sound"),
        Case(model="qwen2.5-omni", prompts="omni sound"),
        Case(model="qwen2.5-omni", sp=devices, prompts="one video"),
        Case(model="qwen2.5-omni, vision frozen", sp=devices, prompts="omni"),
        Case(model="qwen2.5-omni, vision frozen", prompts="one video"),
        Case(model="qwen2.5-omni", sp=devices, prompts="omni", sft=True, freeze=True),
        Case(model="qwen2.5-omni", sp=devices, prompts="omni", lora=True, freeze=True),
        Case(model="qwen3-omni", sp=devices, prompts="omni", budget=300),
        Case(model="qwen3-omni", sp=devices, prompts="omni sound", freeze=True, checkpointing=True, kl=True),
    ]
    check(cases, devices)


@proves("SP", "internvl3.5")
@pytest.mark.parametrize("devices", [3])
def test_tiles_are_shared_by_images_and_frames(devices):
    """Two modules that encode, frozen and not; ranks without a frame, and without a prompt."""
    cases = [
        Case(model="internvl3.5", sp=devices, prompts="internvl"),
        Case(model="internvl3.5", sp=devices, prompts="internvl", freeze=True, kl=True, budget=200),
        Case(model="internvl3.5", sp=devices, prompts="internvl", checkpointing=True, chunks=2),
        Case(model="internvl3.5", sp=devices, prompts="one video"),
        Case(model="internvl3.5", prompts="single"),
        Case(model="internvl3.5", sp=devices, prompts="internvl", lora=True, freeze=True),
    ]
    check(cases, devices)


def test_the_degree_is_chosen_per_batch():
    """Of four ranks one, two or four share a sequence; the others of the team take other micro-batches."""
    cases = [
        Case(sp="auto", budget=budget, freeze=freeze) for budget in (25, 45, 80, 10_000) for freeze in (False, True)
    ]
    check(cases, 4)


@pytest.mark.parametrize("devices", [1, 4])
def test_adapters_on_any_grid(devices):
    """Gradients are those of peft's own model; the reference is the policy with adapters off."""
    cases = [
        case
        for sp in GRIDS[devices]
        for case in (
            Case(sp=sp, lora=True, freeze=True, kl=True, budget=57),
            Case(sp=sp, lora=True, freeze=True, checkpointing=True, sft=True),
            Case(sp=sp, lora=True, freeze=True, prompts="single", kl=True),
            Case(sp=sp, lora=True, freeze=True, replicas=2 if devices > 1 else 1),
        )
    ]
    check(cases, devices)


@pytest.mark.parametrize("devices", [1, 2])
def test_what_saves_memory_changes_no_gradient(devices):
    """Layer inputs in host memory, MLPs in pieces; each alone, both, with adapters, and in the reference's pass."""
    cases = [
        case
        for sp in GRIDS[devices]
        for case in (
            Case(sp=sp, checkpointing=True, offload=True),
            Case(sp=sp, mlp_chunk=7, freeze=True),
            Case(sp=sp, mlp_chunk=7, checkpointing=True, offload=True, kl=True, budget=57),
            Case(sp=sp, mlp_chunk=7, checkpointing=True, offload=True, lora=True, freeze=True, kl=True),
        )
    ]
    check(cases, devices)


@pytest.mark.slow
def test_compiled_layers_change_no_gradient():
    """In shards, on shared sequences, recomputed and in pieces; traced and run as they are, for that takes seconds."""
    options = {"checkpointing": True, "offload": True, "mlp_chunk": 7}
    check([Case(sp=2, model="qwen2.5 text", prompts="text", compiled=True, **options)], 2)


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_parallel_size": 3}, "sequence_parallel_size=3 must divide the 2 devices of the run.*one of 1, 2"),
        ({"sequence_parallel_size": 8}, "sequence_parallel_size=8 must divide the 2 devices"),
        ({"num_replicas": 3}, "num_replicas=3 must divide the 2 devices"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_before_anything_starts(options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(accelerator="cpu", devices=2, strategy=MRSPStrategy(**options), logger=False)


@pytest.mark.parametrize("name", ["sequence_parallel_size", "num_replicas", "num_gather_chunks"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(ValueError, match=rf"trainer\.strategy\.init_args\.{name} must be at least 1, got 0"):
        MRSPStrategy(**{name: 0})


class Unshared(type(vl_family())):
    supports_sequence_parallel = False


def refused(devices):
    family = Unshared(vl_family().model_path, random_init=True)
    with pytest.raises(ValueError, match="Unshared has no sequence parallelism.*size is 2; set it to 1"):
        train(policy_of(family), Batch([], groups=[]), strategy=MRSPStrategy(2), devices=devices)


def test_a_family_without_sequence_parallelism_is_refused_before_weights_are_loaded():
    run_distributed(refused, 2, 2)

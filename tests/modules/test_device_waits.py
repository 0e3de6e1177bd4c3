"""What an update asks of a device, which it then waits for: once in an optimizer step, however many micro-batches.

The device `meta` has no numbers: whatever needs one to go on fails there. So what runs on it waits for nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from longrl import algorithms
from longrl.algorithms import Algorithm, Distillation
from longrl.algorithms.losses import Tokens
from longrl.models.building import BuildsModel
from longrl.modules.mini_batches import MiniBatch, RolloutLoss
from longrl.modules.mismatch import MismatchMonitor
from longrl.modules.policy import PolicyModule
from longrl.modules.scoring import PackedScoring
from longrl.modules.sft_loss import SFTLoss
from longrl.packing import kernels
from longrl.packing.kernels import VarlenBatch
from longrl.packing.pack import pack
from longrl.strategies import sequence as sequence_module
from longrl.strategies.sequence import SequenceParallel
from longrl.types import Batch, PolicyOutput, to_device
from tests.modules.test_policy import batch_of, policy_of, sampled, text_prompts, tokens_of, train, with_targets
from tests.modules.test_preference_step import OBJECTIVES, with_pairs
from tests.teachers import wide_text_teacher
from tests.tiny import (
    frames,
    omni_family,
    omni_prompts,
    qwen3_vl_family,
    row,
    text_family,
    vila_family,
    vl_family,
)

META = torch.device("meta")


class Waits(TorchDispatchMode):
    """Counts operations for which a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += by_mask or name in ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal")
        return function(*args, **(kwargs or {}))


def waits_of_updates(monkeypatch, micro_batch_tokens: int, stage: str, **options):
    """In one rollout or batch of 3 prompts: waits within the update of the weights, and micro-batches."""
    counts = []
    micro_batches = []
    update = PolicyModule.take_step
    make = PackedScoring.micro_batches

    def counted(policy, *args):
        with Waits() as waits:
            result = update(policy, *args)
        counts.append(waits.count)
        return result

    def noted(policy, *args, **options):
        with _disable_current_modes():  # to pack is the host's
            made = make(policy, *args, **options)
        micro_batches.append(len(made[0]))
        return made

    monkeypatch.setattr(PolicyModule, "take_step", counted)
    monkeypatch.setattr(PackedScoring, "micro_batches", noted)
    torch.manual_seed(0)
    if "distillation" in options:
        options["teacher"] = wide_text_teacher()
    policy = policy_of(text_family(), max_tokens_per_micro_batch=micro_batch_tokens, **options)
    prompts = text_prompts(policy.family)
    if stage == "sft":
        train(policy, Batch(with_targets(prompts)))
    elif stage == "preference":
        train(policy, Batch(with_pairs(policy.family, prompts)))
    else:
        policy.mismatch_monitor = MismatchMonitor(max_mismatch=1e9)
        train(policy, batch_of(policy, sampled(policy.family, prompts)))
    return counts, micro_batches


class BlockingCopies(TorchDispatchMode):
    """Counts copies from the host for which all that is queued on a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = function is torch.ops.aten._to_copy.default and args[0].device != kwargs.get("device", args[0].device)
        self.count += leaves and not kwargs.get("non_blocking", False)
        return function(*args, **kwargs)


def test_the_layout_of_a_micro_batch_leaves_the_host_without_waiting():
    family = text_family()
    prompts = text_prompts(family)
    (packed,) = pack(prompts, tokens_of(sampled(family, prompts)), 1 << 30)
    with BlockingCopies() as copies:
        packed.to(META, multiple=4)
        kernels._cu_seqlens(VarlenBatch((3, 4), (3, 4), causal=True), META)
    assert copies.count == 0


def test_ranks_that_share_a_sequence_know_on_the_host_what_they_exchange(monkeypatch):
    def exchanged(tensor, group, send, receive):
        assert sum(send) == len(tensor)
        return tensor.new_empty(sum(receive), *tensor.shape[1:])

    monkeypatch.setattr(sequence_module, "_exchange", exchanged)
    axis = SimpleNamespace(size=2, rank=1, group=None)
    hidden = torch.empty(6, 3, device=META)  # rows 6 to 11
    scored = SequenceParallel(axis).scored(hidden, torch.tensor([0, 5, 6, 11, 11]))
    assert scored.shape == (3, 3)
    assert scored.device == META


def test_what_leaves_for_a_gpu_is_pinned(monkeypatch):
    done = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: done.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **options: done.append((*args, options)) or tensor)
    gpu = torch.device("cuda")
    to_device(torch.zeros(1), gpu)
    assert done == ["pinned", (gpu, {"non_blocking": True})]
    done.clear()
    to_device(torch.zeros(1), META)
    assert done == [(META, {"non_blocking": True})]


SEQUENCES = {"surrogate": algorithms.sequence_clipped, "correction": algorithms.truncated_sequence}


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft", {}),
        ("rl", {}),
        ("rl", {"algorithm": Algorithm(**SEQUENCES)}),
        ("rl", {"distillation": Distillation()}),
        ("sft", {"distillation": Distillation("forward_kl", top_k=3)}),
        ("preference", {"preference": OBJECTIVES["mpo"]}),
    ],
    ids=["sft", "rl", "rl by sequences", "rl with a teacher", "sft with a teacher", "pairs"],
)
def test_an_update_waits_as_often_whatever_the_number_of_micro_batches(monkeypatch, stage, options):
    few, one = waits_of_updates(monkeypatch, 10_000, stage, **options)
    monkeypatch.undo()
    many, several = waits_of_updates(monkeypatch, 59 if stage == "preference" else 57, stage, **options)
    assert set(one) == {1}
    assert max(several) > 2
    assert few == many


def on_meta(tensors):
    return [tensor.to(META) for tensor in tensors]


SURROGATES = {
    "soft": algorithms.SoftGated(),
    "stale": algorithms.StaleClipped(0.5, 2.0),
    "gspo dual": algorithms.SequenceDualClipped(),
}
CORRECTIONS = {
    "product": algorithms.CorrectionProduct([algorithms.GeometricMask(), algorithms.TwoSidedMask()]),
    "drift": algorithms.OffPolicySequenceMask(0.1),
}


@pytest.mark.parametrize(
    ("surrogate", "correction"),
    [
        *itertools.product(
            ["clipped", "sequence_clipped", "cispo", "reinforce"],
            ["no_correction", "masked_token", "truncated_sequence", "masked_sequence"],
        ),
        *itertools.product([*SURROGATES, "geometric_clipped"], ["no_correction"]),
        *itertools.product(["clipped"], CORRECTIONS),
    ],
)
def test_the_loss_of_a_micro_batch_waits_for_nothing(surrogate, correction):
    family = text_family()
    prompts = text_prompts(family)
    (packed,) = pack(prompts, tokens_of(sampled(family, prompts)), 1 << 30)
    packed = packed.to(META)
    num_rows = len(packed.target_ids)
    logp, entropy, advantages, sampler_logp = on_meta(torch.rand(4, num_rows))
    of_completions = torch.rand(6, device=META)
    mini_batch = MiniBatch(
        groups=(),
        advantages=advantages,
        old_logp=logp,
        ref_logp=logp,
        sampler_logp=sampler_logp,
        staleness=(sampler_logp > 0).long(),
        weights=of_completions,
        nonfinite=of_completions > 0,
        high_entropy=algorithms.high_entropy(entropy, entropy > 0, 0.2),
    )
    functions = {
        "surrogate": SURROGATES.get(surrogate) or getattr(algorithms, surrogate),
        "correction": CORRECTIONS.get(correction) or getattr(algorithms, correction),
    }
    algorithm = Algorithm(kl_coef=0.1, **functions)
    loss = RolloutLoss(algorithm, mini_batch, MismatchMonitor())
    result = loss(packed, PolicyOutput(logp.requires_grad_(), entropy))
    result.loss.backward()
    assert SFTLoss(num_rows)(packed, PolicyOutput(logp, entropy)).loss.device == META


def test_sums_over_completions_are_those_over_their_rows_in_any_order():
    index = torch.tensor([7, 2, 7, 900, 2, 2])
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    tokens = Tokens(values, values, values, index)
    assert tokens.completion_sum(values).tolist() == [5.0, 50.0, 5.0, 8.0, 50.0, 50.0]
    none = torch.zeros(0)
    assert Tokens(none, none, none, none.long()).completion_sum(none).tolist() == []


def media_prompts(family):
    if family.supports_audio:
        return omni_prompts(family)
    picture = frames(1, 56)
    return [family.render(row("a"), "What is <image> this?", [dataclasses.replace(picture, kind="image")])]


@pytest.mark.parametrize("make", [text_family, vl_family, qwen3_vl_family, vila_family, omni_family])
@pytest.mark.parametrize("rows", [slice(0, 1 << 30), slice(3, 9)])
def test_placeholders_are_found_without_waiting(make, rows):
    family = make()
    assert isinstance(family, BuildsModel)
    model = family.build()
    prompts = text_prompts(family) if make is text_family else media_prompts(family)
    (packed,) = pack(prompts, [[torch.tensor([1, 2])] for _ in prompts], 1 << 30)
    media = [item for prompt in prompts for item in prompt.media]
    with torch.no_grad():
        encoded = family.encode_media(model, media) if media else []
        features = {item.key: each for item, each in zip(media, encoded, strict=True)}
        wanted = family.text_inputs(model, packed, features, rows)
        moved = {key: value.to(META) for key, value in features.items()}
        found = family.text_inputs(model.to(META), packed.to(META), moved, rows)
    assert found["inputs_embeds"].shape == wanted["inputs_embeds"].shape
    assert found["inputs_embeds"].device == META

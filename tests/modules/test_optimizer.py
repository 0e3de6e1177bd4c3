"""Where the optimizer's moments are, what has any, and whether a step shows in the weights at all."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from longrl.modules.host_adamw import MOMENTS, HostAdamW, offload_state
from longrl.modules.optimizer import OptimizerSettings, fuse_by_device, warn_of_lost_steps
from longrl.strategies.fsdp import ShardingOptions
from longrl.strategies.mr_sp import MRSPStrategy
from longrl.types import Batch
from tests.distributed import run_distributed
from tests.modules.test_policy import batch_of, policy_of, sampled, text_prompts, train
from tests.runs import checkpoint, config, metrics, run
from tests.strategies.test_mr_sp import Encode
from tests.strategies.test_runs import everywhere, grid, weights
from tests.test_resume import LAST, differences
from tests.tiny import mixed_prompts, text_family, vl_family

SHAPES = [(3, 5), (7,), (2, 2, 2), (0, 4)]


def a_few_steps(kind, dtype=torch.float32, steps=4):
    """(optimizer, weights) after some steps on random gradients; one weight never has any."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [*SHAPES, (2,)]]
    optimizer = kind(made, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(steps):
        for weight in made[:-1]:
            weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
        optimizer.step()
    return optimizer, made


# ---- moments in host memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_host_memory_change_no_bit(dtype):
    (ours, found), (theirs, wanted) = a_few_steps(HostAdamW, dtype), a_few_steps(torch.optim.AdamW, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert differences(ours.state_dict(), theirs.state_dict()) == []
    assert len(ours.state) == len(SHAPES)  # none without gradient


def test_restored_moments_go_back_to_the_host(monkeypatch):
    moved = []
    optimizer, _ = a_few_steps(HostAdamW)
    monkeypatch.setattr("longrl.modules.host_adamw._on_host", lambda tensor: moved.append(tensor) or tensor)
    offload_state(optimizer)
    assert len(moved) == len(SHAPES) * len(MOMENTS)
    offload_state(torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))  # others stay as they are


# ---- one kernel for the whole step ----


def on(device):
    """A model whose weight says that it is there."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, 3, device=device))
    return model


@pytest.mark.parametrize(
    ("device", "options", "fused"),
    [
        ("cuda", {}, True),
        ("cpu", {}, None),
        ("cuda", {"offload": True}, None),
    ],
)
def test_adamw_on_a_gpu_makes_no_copies_of_its_moments(device, options, fused):
    """By default its step is `foreach`, with the square roots of all second moments at once."""
    with FakeTensorMode():
        optimizer = OptimizerSettings(**options).build(on(device), None)["optimizer"]
    assert [group["fused"] for group in optimizer.param_groups] == [fused]


def test_a_fused_step_asks_for_nothing_of_the_weights_size():
    with FakeTensorMode():
        model = on("cuda")
        optimizer = OptimizerSettings().build(model, None)["optimizer"]
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()  # torch refuses what cannot be fused
        assert optimizer.state[model.weight]["step"].device.type == "cuda"


@pytest.mark.parametrize(("written", "device", "fused"), [(True, "cpu", None), (None, "cuda", True)])
def test_a_checkpoint_of_another_device_does_not_decide_how_a_step_is_taken(written, device, fused):
    with FakeTensorMode():
        weight = nn.Parameter(torch.zeros(2, 3, device=device))
        optimizer = torch.optim.AdamW([weight])
        optimizer.param_groups[0]["fused"] = written
        optimizer.state[weight] = {"step": torch.zeros((), device="cuda" if written else "cpu")}
        fuse_by_device(optimizer)
        assert optimizer.param_groups[0]["fused"] is fused
        assert optimizer.state[weight]["step"].device.type == device


def sft(**optimizer):
    values = config("sft")
    values["trainer"] |= {"max_epochs": 1}
    values["model"]["optimizer"] |= optimizer
    values["checkpoint"] = {"every_n_train_steps": 3}
    return values


def stopped_and_resumed(folder, values, go=run):
    """After 3 of 6 steps; the schedule is that of the whole."""
    values = copy.deepcopy(values)
    values["model"]["optimizer"]["total_steps"] = 6
    values["trainer"] |= {"max_epochs": None, "max_steps": 3}
    go(folder, values)
    values["trainer"]["max_steps"] = 6
    return go(folder, values, f"--ckpt_path={folder / LAST}")


def test_a_run_with_moments_in_host_memory_resumes_as_the_plain_run(tmp_path):
    plain = run(tmp_path / "plain", sft())
    found = stopped_and_resumed(tmp_path / "run", sft(offload=True))
    assert metrics(found) == metrics(plain)
    for part in ("state_dict", "optimizer_states"):
        assert differences(checkpoint(found)[part], checkpoint(plain)[part]) == []


def test_shards_with_moments_in_host_memory_resume_as_the_plain_run(tmp_path):
    def go(folder, values, *more):
        return everywhere(grid(values, 2, 2, values["trainer"]["max_steps"]), 2, folder, *more)

    plain = stopped_and_resumed(tmp_path / "plain", sft(), go)
    found = stopped_and_resumed(tmp_path / "run", sft(offload=True), go)
    assert metrics(found) == metrics(plain)
    assert differences(weights(found), weights(plain)) == []


# ---- steps that are rounded away ----


def moved(dtype, compute_dtype):
    """Share of the text stack's weights that two steps of 1e-6 change, on one device, as on many."""
    policy = policy_of(text_family(dtype=dtype), optimizer=OptimizerSettings(lr=1e-6))
    before = {}

    def keep(policy):
        before.update({name: p.full_tensor().clone() for name, p in policy.model.named_parameters()})

    prompts = text_prompts(policy.family)
    batches = [Batch(prompts, groups=sampled(policy.family, prompts)) for _ in range(2)]
    strategy = MRSPStrategy(sharding=ShardingOptions(compute_dtype=compute_dtype))
    train(policy, *batches, before=keep, strategy=strategy, precision="32-true")
    after = {name: p.full_tensor() for name, p in policy.model.named_parameters()}
    changed = sum(int((after[name] != value).sum()) for name, value in before.items())
    return changed / sum(value.numel() for value in before.values()), {value.dtype for value in after.values()}


def test_float32_weights_computed_in_bfloat16_take_small_steps_on_one_device():
    """`--trainer configs/trainer/node.yaml --trainer.devices 1 --model.family.init_args.dtype float32`."""
    ((share, kept),) = run_distributed(moved, 1, "float32", "bfloat16")
    assert kept == {torch.float32}
    assert share > 0.6  # the rest are embeddings of tokens that no prompt has
    ((share, kept),) = run_distributed(moved, 1, "bfloat16", None)
    assert kept == {torch.bfloat16}
    assert share < 0.1


def test_steps_that_are_rounded_away_get_a_warning_with_the_remedy(caplog):
    weight = nn.Parameter(torch.full((1000,), 0.02).bfloat16())
    with caplog.at_level(logging.WARNING):
        warn_of_lost_steps([weight], 1e-3)
        warn_of_lost_steps([nn.Parameter(weight.float())], 1e-6)
        warn_of_lost_steps([], 1e-6)
    assert not caplog.text
    warn_of_lost_steps([weight], 1e-6)
    assert "lr=1e-06 is rounded away in 100% of the weights in bfloat16" in caplog.text
    assert "--model.family.init_args.dtype float32 (with --trainer.devices 1 on one GPU)" in caplog.text


# ---- what does not train ----


def test_a_frozen_tower_has_no_gradients_no_moments_and_no_graph():
    policy = policy_of(vl_family(freeze_vision_encoder=True))
    batch = batch_of(policy, sampled(policy.family, mixed_prompts(policy.family)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        features = policy.features.get_or_encode(policy.model, batch.prompts)
    assert not saved
    assert not [key for key, value in features.items() if value.requires_grad or value.grad_fn is not None]
    train(policy, batch)
    vision_encoder = list(policy.family.media_encoders(policy.model)[0].parameters())
    assert vision_encoder
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in vision_encoder)
    kept = policy.trainer.optimizers[0].state
    assert len(kept) == sum(parameter.requires_grad for parameter in policy.model.parameters())
    assert not [parameter for parameter in vision_encoder if parameter in kept]


def tower_precision(freeze):
    family = vl_family(freeze_vision_encoder=freeze)
    policy = policy_of(family)
    groups = sampled(family, mixed_prompts(family))
    strategy = MRSPStrategy(sharding=ShardingOptions(compute_dtype="bfloat16"))
    batch = Batch([group.prompt for group in groups], groups=groups)
    train(policy, batch, strategy=strategy, precision="32-true", callbacks=[Encode()])
    dtypes = [{p.dtype for p in part.parameters()} for part in (family.media_encoders(policy.model)[0], policy.policy)]
    return [*dtypes, {value.dtype for value in batch.features.values()}]


def test_a_frozen_tower_has_the_precision_of_computing():
    whole, half = {torch.float32}, {torch.bfloat16}
    assert run_distributed(tower_precision, 1, True) == [[half, whole, half]]
    assert run_distributed(tower_precision, 1, False)[0][:2] == [whole, whole]

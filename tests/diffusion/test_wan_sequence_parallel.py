"""Wan with its tokens shared by two ranks: velocities and gradients are those of one."""

from types import SimpleNamespace

import pytest
import torch

from longrl.diffusion.sampler import seeded_noise
from longrl.models.lora import LoRASettings
from longrl.strategies.axis import Axis
from longrl.strategies.sequence import SequenceParallel
from tests.diffusion.tiny import sd3_family, wan_family, wan_folder
from tests.distributed import run_distributed

TEXTS = ["a red picture", "a small cat", "two photos"]


def answer(folder, sizes, options):
    """Velocities of three rows, and the gradients of a loss of them, summed over the ranks."""
    family = wan_family(folder=folder, **sizes, **options)
    model = family.build().train()
    if options.get("lora"):
        family.add_adapters(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B" in name:
                    parameter += 0.05
    axis = Axis.of(None) if torch.distributed.is_initialized() else Axis()
    if axis.size > 1:
        family.shard_tokens(model, SequenceParallel(axis))
    latents = torch.stack([seeded_noise(seed, 0, family.latent_shape()) for seed in range(3)])
    velocity = family.forward(model, latents, torch.tensor([900.0, 500.0, 100.0]), TEXTS, 2.0)
    (velocity * seeded_noise(9, 0, velocity.shape)).sum().backward()
    grads = {name: axis.sum(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return velocity.detach(), grads


@pytest.mark.parametrize(
    ("heads", "ranks", "sizes", "options"),
    [
        (3, 2, {"width": 48, "height": 48, "num_frames": 1}, {"gradient_checkpointing": True}),  # 9 tokens
        (2, 3, {"width": 32}, {"lora": LoRASettings(rank=2)}),  # 8 tokens, 2 heads
    ],
)
def test_shared_tokens_give_the_velocities_and_all_gradients_of_one_rank(heads, ranks, sizes, options):
    folder = wan_folder(heads)
    expected, grads = answer(folder, sizes, options)
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for velocity, found in run_distributed(answer, ranks, folder, sizes, options):
        torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=1e-5)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 * largest)


def test_a_family_without_sharing_says_so():
    with pytest.raises(ValueError, match="SD3Family cannot share a sample among 2 ranks; set sequence_parallel_size"):
        sd3_family().shard_tokens(None, SimpleNamespace(size=2))

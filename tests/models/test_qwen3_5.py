"""Qwen3.5: packed groups against transformers' own class, one forward per completion, from pixels."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from longrl.packing import delta_kernels
from longrl.testing.plain_forward import decay_noise
from tests.families import FAMILIES, cell
from tests.models.test_packed_equals_separate import packed_logps
from tests.tiny import (
    assert_same_gradients,
    gradients,
    plain_model,
    random_completions,
    separate_logps,
)

LENGTHS = [[3, 0, 1, 4], [5], [2, 70]]
MODELS = ("qwen3.5", "qwen3.5-moe", "qwen3.5-text")


@pytest.mark.parametrize("name", [cell(["same logits", "shared prefix"], name) for name in MODELS])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_packed_groups_are_one_forward_per_completion(name, checkpointing):
    """Log-probabilities and all gradients; those of decays within what chunks of another size change in them."""
    family = FAMILIES[name].make(gradient_checkpointing=checkpointing)
    prompts = FAMILIES[name].prompts(family)
    model = family.build()
    completions = random_completions(family, LENGTHS)
    plain = plain_model(model, family)
    wanted = separate_logps(plain, prompts, completions)
    coefficients = torch.randn(len(wanted), generator=torch.Generator().manual_seed(1))
    (wanted * coefficients).sum().backward()
    expected = gradients(plain)
    trainable = any("visual" in parameter for parameter in expected)

    def found(prompts, completions, max_tokens):
        model.zero_grad()
        logps = packed_logps(family, model, prompts, completions, coefficients, max_tokens, trainable)
        return logps.double(), gradients(model)

    with mock.patch.object(delta_kernels, "CHUNK_ROWS", 32):
        repeated = [prompt for prompt, group in zip(prompts, completions, strict=True) for _ in group]
        _, alone = found(repeated, [[completion] for group in completions for completion in group], 10_000)
    noise = decay_noise(alone, expected)
    for max_tokens in (250, 10_000):
        logps, grads = found(prompts, completions, max_tokens)
        assert (logps - wanted).norm() <= 1e-5 * wanted.norm()
        assert_same_gradients(grads, expected, 1e-5, noise)

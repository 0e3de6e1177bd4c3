"""Qwen3.5: packed groups against transformers' own class, one forward per completion, from pixels."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.models.qwen3_5 import Qwen3_5TextFamily
from longrl.packing import delta_kernels
from longrl.packing.pack import pack
from longrl.testing.plain_forward import decay_noise
from longrl.testing.tiny import tiny_qwen3_5_text
from longrl.types import SamplingParams
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


SIZES = {
    "as many key heads, short convolution": {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "conv": 2},
    "one head, long convolution": {"linear_num_key_heads": 1, "linear_num_value_heads": 1, "conv": 7},
    "no convolution, wide keys": {"linear_key_head_dim": 16, "linear_value_head_dim": 8, "conv": 1},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_other_heads_and_convolutions_are_transformers_too(sizes, tmp_path):
    """Packed groups, and the engine in chunks of one token."""
    sizes = {"linear_conv_kernel_dim" if name == "conv" else name: size for name, size in sizes.items()}
    family = Qwen3_5TextFamily(str(tiny_qwen3_5_text(tmp_path, **sizes)), random_init=True)
    model, prompts = family.build(), FAMILIES["qwen3.5-text"].prompts(family)
    sampling = SamplingParams(num_generations=3, max_completion_tokens=5)
    groups = HFEngine(prefill_chunk_tokens=1).generate(family, model, prompts, {}, sampling, seed=1)
    completions = [[answer.token_ids for answer in group] for group in groups]
    (packed,) = pack(prompts, completions, 10_000)
    with torch.no_grad():
        wanted = separate_logps(plain_model(model, family), prompts, completions)
        found = family.forward(model, packed, {}).logp
    said = torch.cat([answer.logprobs for group in groups for answer in group])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said.double(), wanted, rtol=1e-5, atol=1e-5)


# ---- in float64, against the rule token by token ----


class TokenByToken(nn.Module):
    """A gated delta net of transformers with its convolution and rule written out, for one sequence."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        layer = self.layer
        (hidden,) = hidden_states
        padded = F.pad(layer.in_proj_qkv(hidden), (0, 0, layer.conv_kernel_size - 1, 0))
        mixed = F.silu((padded.unfold(0, layer.conv_kernel_size, 1) * layer.conv1d.weight[:, 0]).sum(-1))
        query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
        shared = layer.num_v_heads // layer.num_k_heads
        query, key = (x.unflatten(-1, (-1, layer.head_k_dim)).repeat_interleave(shared, 1) for x in (query, key))
        query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
        value = value.unflatten(-1, (-1, layer.head_v_dim))
        kept = torch.exp(-layer.A_log.exp() * F.softplus(layer.in_proj_a(hidden) + layer.dt_bias))
        beta = layer.in_proj_b(hidden).sigmoid()
        state = mixed.new_zeros(layer.num_v_heads, layer.head_k_dim, layer.head_v_dim)
        outputs = []
        for row in range(len(hidden)):
            state = state * kept[row, :, None, None]
            missing = value[row] - (state * key[row, :, :, None]).sum(1)
            state = state + (beta[row, :, None] * key[row])[:, :, None] * missing[:, None]
            outputs.append((state * query[row, :, :, None]).sum(1) * layer.head_k_dim**-0.5)
        gate = layer.in_proj_z(hidden).view(len(hidden), -1, layer.head_v_dim)
        return layer.out_proj(layer.norm(torch.stack(outputs), gate).flatten(1))[None]


class DoubleNorm(nn.Module):
    """An RMSNorm that rounds nothing to float32: with a gate, or with weights stored minus one."""

    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight
        self.offset = 0.0 if "Gated" in type(norm).__name__ else 1.0

    def forward(self, hidden, gate=None):
        normed = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (self.offset + self.weight)
        return normed if gate is None else normed * F.silu(gate)


def in_float64(model):
    for name, module in list(model.double().named_modules()):
        if "RMSNorm" in type(module).__name__:
            model.set_submodule(name, DoubleNorm(module))
    return model


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.5-text"])  # transformers' router rounds to float32
def test_in_float64_nothing_is_left_to_noise(name):
    family = FAMILIES[name].make(freeze_vision_encoder=True) if name != "qwen3.5-text" else FAMILIES[name].make()
    prompts = FAMILIES[name].prompts(family)[:2]
    completions = random_completions(family, [[3, 0, 1], [2, 8]])
    model = family.build()
    plain = plain_model(model, family)
    plain.set_attn_implementation("sdpa")  # transformers' eager attention rounds to float32
    in_float64(model)
    in_float64(plain)
    for layer in plain.get_decoder().layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn = TokenByToken(layer.linear_attn)
    wanted = separate_logps(plain, prompts, completions)
    coefficients = torch.randn(len(wanted), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (wanted * coefficients).sum().backward()
    expected = {key.replace("linear_attn.layer.", "linear_attn."): grad for key, grad in gradients(plain).items()}
    (packed,) = pack(prompts, completions, 10_000)
    inputs = family.text_inputs(model, packed, FeatureCache(family).get_or_encode(model, prompts))
    hidden = family.hidden_states(model, packed.position_ids[:, None], packed.spans, **inputs)[0]
    logits = model.get_output_embeddings()(hidden[packed.predict_from])  # `forward` scores in float32
    logps = logits.log_softmax(-1).gather(-1, packed.target_ids[:, None])[:, 0]
    (logps * coefficients).sum().backward()
    assert (logps - wanted).norm() <= 1e-9 * wanted.norm()
    found = gradients(model)
    assert_same_gradients(found, {key: expected[key] for key in found}, 1e-9)

"""Encoders that attend in one call per layer, against transformers' loop over their sequences."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from longrl.packing import encoder_attention, kernels
from longrl.packing.encoder_attention import encoder_attention_forward, equal_lengths_attention, varlen_attention
from tests.packing.test_kernels import Calls
from tests.tiny import frames, omni_family, qwen3_omni_family, qwen3_vl_family, sound, vl_family

HEADS, SIZE = 4, 16


class CountAttention(TorchFunctionMode):
    """Counts calls of torch's attention."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def seeing(make, pixels):
    """A family whose frames may be several windows wide, its model, and media of several sizes."""
    family = make(max_pixels=pixels, max_video_pixels=1 << 30)
    media = [
        family.patch(frames(5, 100, 130, "long")),  # grids that no number of windows fills
        family.patch(frames(1, 40, 40, "image", "image")),
        family.patch(frames(8, 87, 113, "other")),
    ]
    if family.supports_audio:
        media.append(family.patch(sound(5.3)))  # two whole windows and a shorter one
    return family, family.build(), media


def encoded(family, model, media):
    """(features, gradient by name of parameter, calls of torch's attention)."""
    model.zero_grad()
    with CountAttention() as count:
        features = family.encode_media(model, media)
    generator = torch.Generator().manual_seed(0)
    sum((rows * torch.randn(rows.shape, generator=generator)).sum() for rows in features).backward()
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return features, grads, count.calls


def loop(family, model, media):
    """The same with the attention that transformers calls for every sequence."""
    ours = {name: getattr(model.config, name)._attn_implementation for name in family.encoder_configs}
    model.set_attn_implementation(dict.fromkeys(ours, "sdpa"))
    result = encoded(family, model, media)
    model.set_attn_implementation(ours)
    return result


FAMILIES = pytest.mark.parametrize(
    ("make", "pixels"),
    [
        (vl_family, 140 * 140),
        (qwen3_vl_family, 160 * 160),
        (omni_family, 140 * 140),
        (qwen3_omni_family, 160 * 160),
    ],
)


@FAMILIES
def test_a_call_per_length_has_the_bits_of_a_call_per_sequence(make, pixels):
    family, model, media = seeing(make, pixels)
    features, grads, calls = encoded(family, model, media)
    theirs, their_grads, their_calls = loop(family, model, media)
    for ours, wanted in zip(features, theirs, strict=True):
        assert torch.equal(ours, wanted)
    assert len(grads) > 20
    assert grads.keys() == their_grads.keys()
    assert all(torch.equal(grad, their_grads[name]) for name, grad in grads.items())
    assert calls <= their_calls / 2


@FAMILIES
@pytest.mark.parametrize("kind", ["torch_flash", "flash_attn"])
def test_a_varlen_kernel_is_called_once_per_layer_each_way(make, pixels, kind, monkeypatch):
    calls = Calls()
    kernel = getattr(calls, kind)()
    monkeypatch.setattr(encoder_attention, "kernel_for", lambda query: kernel)
    family, model, media = seeing(make, pixels)
    features, grads, others = encoded(family, model, media)
    theirs, their_grads, _ = loop(family, model, media)
    for ours, wanted in zip(features, theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        assert (grad - their_grads[name]).norm() <= 1e-5 * their_grads[name].norm() + 1e-6
    layers = sum(len(getattr(encoder, "blocks", ())) or len(encoder.layers) for encoder in family.media_encoders(model))
    assert (calls.forward, calls.backward, others) == (layers, layers, 0)


@pytest.mark.parametrize("lengths", [(64,), (64, 64, 64), (4, 64, 32, 64, 16, 4), (1, 7, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sequences_see_themselves_and_nothing_else(lengths, dtype):
    states = torch.randn(3, sum(lengths), HEADS, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    found = equal_lengths_attention(*states, cu_seqlens, 0.3)
    assert found.dtype == dtype
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        query, key, value = states[:, start : start + length].double()
        probabilities = (torch.einsum("qhd,nhd->hqn", query, key) * 0.3).softmax(-1)
        wanted = torch.einsum("hqn,nhd->qhd", probabilities, value)
        tolerance = 1e-9 if dtype == torch.float64 else 2e-2
        torch.testing.assert_close(found[start : start + length].double(), wanted, rtol=tolerance, atol=tolerance)


def test_layers_give_their_memory_to_the_kernel_without_a_copy_and_single_rows_take_the_usual_path():
    kernel = Calls().torch_flash()
    seen = []
    inner = kernel.forward_rows

    def forward_rows(states, seqlens, causal, scale):
        seen.append((states, seqlens))
        assert not causal
        return inner(states, seqlens, causal, scale)

    kernel.forward_rows = forward_rows
    query, key, value = torch.randn(5, 3, HEADS, SIZE).unbind(1)  # of one projection, as Qwen3-VL's
    cu_seqlens = torch.arange(6, dtype=torch.int32)
    output = varlen_attention(query, key, value, cu_seqlens, 1, 0.3, kernel)
    torch.testing.assert_close(output, value)  # a row alone sees itself
    ((states, seqlens),) = seen
    assert [x.data_ptr() for x in states] == [query.data_ptr(), key.data_ptr(), value.data_ptr()]
    assert seqlens[0] is cu_seqlens
    assert seqlens[2:] == (2, 2)


def test_half_precision_stays_what_it_is_and_so_does_the_choice_of_a_kernel(monkeypatch):
    query = torch.randn(1, HEADS, 12, SIZE)
    value = torch.randn(1, HEADS, 12, SIZE, dtype=torch.bfloat16)
    sequences = {"cu_seq_lens_q": torch.tensor([0, 4, 12], dtype=torch.int32), "max_length_q": 8}
    for name in ("auto", "eager"):
        monkeypatch.setenv(kernels.VARIABLE, name)
        output, _ = encoder_attention_forward(types.SimpleNamespace(), query, query, value, None, **sequences)
        assert output.dtype == torch.bfloat16
        assert output.shape == (1, 12, HEADS, SIZE)
    monkeypatch.setenv(kernels.VARIABLE, "flash_attn")
    with pytest.raises(ValueError, match="LONGRL_ATTENTION must be auto"):
        encoder_attention_forward(types.SimpleNamespace(), query, query, value, None, **sequences)


def test_dropout_in_an_encoder_is_refused():
    states = torch.randn(1, HEADS, 4, SIZE)
    with pytest.raises(ValueError, match="encoders need attention_dropout=0, got 0.1"):
        encoder_attention_forward(
            types.SimpleNamespace(), states, states, states, None, dropout=0.1,
            cu_seq_lens_q=torch.tensor([0, 4], dtype=torch.int32), max_length_q=4,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [80, 72], ids=["Qwen2.5-VL", "Qwen3-VL"])
@pytest.mark.parametrize("kernel", ["auto", "torch_flash", "flash_attn", "eager"])
def test_on_a_gpu_every_kernel_equals_the_loop(kernel, size, dtype, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, kernel)
    lengths = [64, 64, 32, 64, 64, 32, 16, 16, 8, 640, 4]
    states = torch.randn(3, 1, 16, sum(lengths), size, device="cuda", dtype=dtype).requires_grad_()
    try:
        kernels.kernel_for(states)
    except ValueError as error:
        pytest.skip(str(error))
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    sequences = {"cu_seq_lens_q": cu_seqlens, "max_length_q": max(lengths)}
    found, _ = encoder_attention_forward(types.SimpleNamespace(), *states, None, **sequences)

    exact = states.detach().double().requires_grad_()
    parts = [F.scaled_dot_product_attention(*part) for part in exact.split(lengths, dim=3)]
    wanted = torch.cat(parts, dim=2).transpose(1, 2)
    grad_output = torch.randn_like(wanted).to(dtype)
    (grad,) = torch.autograd.grad(found, states, grad_output)
    (wanted_grad,) = torch.autograd.grad(wanted, exact, grad_output.double())
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-4
    assert (found - wanted).norm() < limit * wanted.norm()
    assert (grad - wanted_grad).norm() < limit * wanted_grad.norm()

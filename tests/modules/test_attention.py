import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longrl.modules import attention
from longrl.modules.attention import dense_mask, shared_prefix_attention
from longrl.modules.kernels import CpuFlash, Portable
from longrl.types import GroupSpan

SPANS = (GroupSpan(0, 7, (3, 1, 5)), GroupSpan(16, 4, (6,)), GroupSpan(26, 3, ()), GroupSpan(29, 2, (0, 2, 1)))
LENGTH = 36  # two tokens of padding behind the last span


def tensors(spans=SPANS, length=LENGTH, heads=6, key_heads=2, size=8, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [(heads, length, size), (key_heads, length, size), (key_heads, length, size)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def dense(query, key, value, spans, scale):
    """Independent oracle in float64: softmax over an explicit mask, heads repeated."""
    repeat = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeat, 0).double(), value.repeat_interleave(repeat, 0).double()
    scores = (query.double() @ key.mT) * scale
    mask = dense_mask(spans, query.shape[1])
    probs = scores.masked_fill(~mask, -1e300).softmax(-1)
    return torch.where(mask.any(-1)[:, None], probs @ value, 0.0)


def grads_of(output, inputs):
    weight = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((output.double() * weight).sum(), inputs)


@pytest.mark.parametrize("kernel", [CpuFlash(), Portable()], ids=["cpu_flash", "portable"])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
def test_equals_dense_mask_in_output_and_gradients(kernel, heads, monkeypatch):
    monkeypatch.setattr(attention, "kernel_for", lambda query: kernel)
    inputs = tensors(heads=heads[0], key_heads=heads[1])
    found, wanted = shared_prefix_attention(*inputs, SPANS, 0.3), dense(*inputs, SPANS, 0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(grads_of(found, inputs), grads_of(wanted, inputs), strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_portable_kernel_in_small_slices_passes_gradcheck():
    inputs = tensors(spans=SPANS[:1], length=16, heads=2, key_heads=1, size=4, dtype=torch.float64)
    kernel = Portable()
    kernel.max_scores = 8  # one query at a time
    attention_kernel, attention.kernel_for = attention.kernel_for, lambda query: kernel
    try:
        assert torch.autograd.gradcheck(lambda *x: shared_prefix_attention(*x, SPANS[:1], 0.5), inputs)
    finally:
        attention.kernel_for = attention_kernel


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 5), max_size=4)), min_size=1, max_size=4))
def test_any_layout_equals_dense_mask(layout):
    spans, start = [], 0
    for prompt, completions in layout:
        spans.append(GroupSpan(start, prompt, tuple(completions)))
        start = spans[-1].stop
    inputs = tensors(length=start)
    found, wanted = shared_prefix_attention(*inputs, spans, 0.3), dense(*inputs, spans, 0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_dense_mask_by_hand():
    mask = dense_mask([GroupSpan(0, 2, (1, 2))], 6).int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_sliding_windows_and_dropout_are_refused():
    module = torch.nn.Module()
    module.layer_idx, module.sliding_window = 3, 64
    states = [x[None].detach() for x in tensors()]
    with pytest.raises(ValueError, match="layer 3 uses one of 64 tokens"):
        attention.attention_forward(module, *states, None, spans=SPANS)
    module.sliding_window = None
    with pytest.raises(ValueError, match=r"attention_dropout=0, got 0\.1"):
        attention.attention_forward(module, *states, None, spans=SPANS, dropout=0.1)


def test_without_layout_it_is_plain_causal_attention():
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    query, key, value = (x[None].detach() for x in tensors())
    found, _ = attention.attention_forward(module, query, key, value, None, scaling=0.3, is_causal=True)
    wanted = F.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), is_causal=True, scale=0.3
    )
    torch.testing.assert_close(found, wanted.transpose(1, 2))

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from longrl.packing import attention
from longrl.packing.attention import dense_mask, shared_prefix_attention
from longrl.packing.kernels import VARIABLE, CpuFlashKernel, EagerKernel, kernel_for
from longrl.strategies.sequence import HeadLayout
from longrl.types import GroupSpan
from tests.packing import tiled_oracle

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


@pytest.mark.parametrize("kernel", [CpuFlashKernel(), EagerKernel()], ids=["cpu_flash", "eager"])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
def test_equals_dense_mask_in_output_and_gradients(kernel, heads, monkeypatch):
    monkeypatch.setattr(attention, "kernel_for", lambda query: kernel)
    inputs = tensors(heads=heads[0], key_heads=heads[1])
    found, wanted = shared_prefix_attention(*inputs, SPANS, 0.3), dense(*inputs, SPANS, 0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(grads_of(found, inputs), grads_of(wanted, inputs), strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_eager_kernel_in_small_slices_passes_gradcheck():
    inputs = tensors(spans=SPANS[:1], length=16, heads=2, key_heads=1, size=4, dtype=torch.float64)
    kernel = EagerKernel()
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
    found, wanted = shared_prefix_attention(*inputs, tuple(spans), 0.3), dense(*inputs, spans, 0.3)
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
        attention.attention_forward(module, *states, None, layout=attention.PackedLayout(SPANS))
    module.sliding_window = None
    with pytest.raises(ValueError, match=r"attention_dropout=0, got 0\.1"):
        attention.attention_forward(module, *states, None, layout=attention.PackedLayout(SPANS), dropout=0.1)


def test_without_layout_it_is_plain_causal_attention():
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    query, key, value = (x[None].detach() for x in tensors())
    found, _ = attention.attention_forward(module, query, key, value, None, scaling=0.3, is_causal=True)
    wanted = F.scaled_dot_product_attention(
        query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), is_causal=True, scale=0.3
    )
    torch.testing.assert_close(found, wanted.transpose(1, 2))


# ---- long sequences ----


def random_layout(length, seed=0):
    """Groups of uneven prompts with 1 to 8 uneven completions, the first prompt half of everything."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    spans, start, prompt = [], 0, length // 2 + 13
    while start < length - 64:
        left = length - start - prompt
        completions = [draw(1, 1 + max(2, left // 16)) for _ in range(draw(1, 9))] if left > 32 else [max(1, left)]
        spans.append(GroupSpan(start, prompt, tuple(completions)))
        start = spans[-1].stop
        prompt = draw(8, max(9, (length - start) // 2))
    return tuple(spans), start + 3


def compared(found, wanted):
    """Largest relative error of an output and its three gradients."""
    pairs = zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True)
    return max(float((ours.to(theirs) - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


def with_gradients(inputs, spans, grad_output, scale):
    output = shared_prefix_attention(*inputs, spans, scale)
    return output.detach(), torch.autograd.grad(output, inputs, grad_output.to(output))


@pytest.mark.parametrize("tile", [5, 64])
def test_the_tiled_oracle_equals_the_dense_one(tile):
    inputs = tensors()
    wanted = dense(*inputs, SPANS, 0.3)
    grad_output = torch.randn(wanted.shape, dtype=torch.float64)
    output, grads = tiled_oracle.attention(*inputs, grad_output, SPANS, 0.3, tile)
    torch.testing.assert_close(output, wanted)
    for ours, theirs in zip(grads, torch.autograd.grad(wanted, inputs, grad_output), strict=True):
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_long_uneven_groups_equal_the_tiled_oracle():
    spans, length = random_layout(17_000)
    inputs = tensors(spans, length, 2, 1, size=16)
    grad_output = torch.randn(inputs[0].shape, dtype=torch.float64)
    found = with_gradients(inputs, spans, grad_output, 0.25)
    assert compared(found, tiled_oracle.attention(*inputs, grad_output, spans, 0.25)) < 1e-5


# ---- on a GPU ----

LAYOUTS = {
    "uneven groups": SPANS,
    "one completion": (GroupSpan(0, 1000, (77,)),),
    "eight completions": (GroupSpan(0, 3000, (1, 64, 500, 127, 129, 3, 256, 200)),),
    "several groups": (GroupSpan(0, 700, (30, 1, 200)), GroupSpan(931, 5, (9, 9)), GroupSpan(954, 300, (40,))),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "torch_flash", "flash_attn", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(28, 4), (4, 1), (16, 16)], ids=["7B", "its share on 8 ranks", "no sharing"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_on_a_gpu_every_kernel_equals_the_oracle(layout, heads, dtype, kernel, monkeypatch):
    monkeypatch.setenv(VARIABLE, kernel)
    length = layout[-1].stop + 3
    inputs = [x.detach().to("cuda", dtype).requires_grad_() for x in tensors(layout, length, *heads, size=128)]
    try:
        kernel_for(inputs[0])
    except ValueError as error:
        pytest.skip(str(error))
    grad_output = torch.randn(inputs[0].shape, dtype=torch.float64).to("cuda", dtype).double()
    wanted = tiled_oracle.attention(*inputs, grad_output, layout, 128**-0.5)  # on the GPU: minutes on its host
    found = with_gradients(inputs, layout, grad_output, 128**-0.5)
    assert compared(found, wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 8])
def test_on_a_gpu_the_heads_that_ulysses_deals_give_the_whole(ranks):
    spans = LAYOUTS["several groups"]
    length = spans[-1].stop + 1
    inputs = [x.detach().to("cuda", torch.bfloat16) for x in tensors(spans, length, 28, 4, size=128)]
    plan = HeadLayout.make(28, 4, ranks)
    dealt = plan.scatter(*inputs).view(ranks, plan.per_rank, plan.size + 2, length, -1)
    parts = [shared_prefix_attention(x[:, :-2].flatten(0, 1), x[:, -2], x[:, -1], spans, 0.09) for x in dealt]
    found = plan.gather(torch.cat(parts).view(ranks * plan.per_rank, plan.size, length, -1))
    torch.testing.assert_close(found, shared_prefix_attention(*inputs, spans, 0.09), rtol=0, atol=0.02)

"""Which kernel is chosen, and what CUDA's are called with: dense stand-ins take the place of their operators."""

import importlib.util
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from longrl.packing import attention, kernels
from longrl.packing.attention import shared_prefix_attention
from longrl.packing.kernels import (
    CpuFlashKernel,
    EagerKernel,
    FlashAttnKernel,
    TorchFlash3Kernel,
    TorchFlashKernel,
    VarlenBatch,
    kernel_for,
)
from longrl.strategies.sequence import HeadLayout
from longrl.types import GroupSpan
from tests.packing.test_attention import LENGTH, SPANS, dense, grads_of, tensors

# ---- float64 stand-ins with the operators' own signatures ----


def dense_varlen(query, key, value, rows, keys, causal, scale):
    """[Q, H, D], [N, K, D] -> (scores [H, q, n], rows, keys) of each sequence."""
    assert rows.dtype == keys.dtype == torch.int32
    assert (rows[-1], keys[-1]) == (len(query), len(key)), "a row outside every sequence would be left uninitialised"
    repeat = query.shape[1] // key.shape[1]
    for i in range(len(rows) - 1):
        own, seen = slice(rows[i], rows[i + 1]), slice(keys[i], keys[i + 1])
        keys_of = key[seen].repeat_interleave(repeat, 1).double()
        scores = torch.einsum("qhd,nhd->hqn", query[own].double(), keys_of) * scale
        if causal:  # both kernels align the last query with the last key
            later = torch.ones(scores.shape[1:]).triu(1 + scores.shape[2] - scores.shape[1]).bool()
            scores = scores.masked_fill(later, float("-inf"))
        yield scores, own, seen


def varlen_forward(query, key, value, rows, keys, max_rows, max_keys, causal, scale):
    assert max_rows >= 2, "with single queries the real kernel returns its log-sum-exp in another shape"
    assert (max_rows, max_keys) >= (int(rows.diff().max()), int(keys.diff().max()))
    output, lse = torch.full_like(query, float("nan")), torch.full(query.shape[1::-1], float("nan"))
    repeat = query.shape[1] // key.shape[1]
    for scores, own, seen in dense_varlen(query, key, value, rows, keys, causal, scale):
        values = value[seen].repeat_interleave(repeat, 1).double()
        output[own] = torch.einsum("hqn,nhd->qhd", scores.softmax(-1), values).to(query.dtype)
        lse[:, own] = scores.logsumexp(-1).float()
    return output, lse


def varlen_backward(grad, query, key, value, output, lse, rows, keys, causal, scale):
    """From the log-sum-exp and output that are given, as the real kernels do."""
    assert lse.is_contiguous()
    assert lse.shape == query.shape[1::-1]
    grads = [torch.full_like(x, float("nan")) for x in (query, key, value)]
    repeat = query.shape[1] // key.shape[1]
    delta = (grad.double() * output.double()).sum(-1).T[..., None]
    for scores, own, seen in dense_varlen(query, key, value, rows, keys, causal, scale):
        keys_of, values = (x[seen].repeat_interleave(repeat, 1).double() for x in (key, value))
        probs = torch.exp(scores - lse[:, own, None].double())
        of_scores = probs * (torch.einsum("qhd,nhd->hqn", grad[own].double(), values) - delta[:, own]) * scale
        grads[0][own] = torch.einsum("hqn,nhd->qhd", of_scores, keys_of).to(query.dtype)
        of_keys = torch.einsum("hqn,qhd->nhd", of_scores, query[own].double())
        of_values = torch.einsum("hqn,qhd->nhd", probs, grad[own].double())
        for place, states in ((1, of_keys), (2, of_values)):
            grads[place][seen] = states.unflatten(1, (-1, repeat)).sum(2).to(query.dtype)
    return tuple(grads)


def on_meta(operator, *arguments, **options):
    """Asks the real operator, on tensors without content, whether it takes these arguments; -> shapes it returns."""
    there = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    return [x.shape for x in operator(*there, **options)]


class Calls:
    """Counts calls of the stand-ins."""

    def __init__(self):
        self.forward, self.backward = 0, 0

    def torch_flash(self):
        aten = torch.ops.aten

        def forward(query, key, value, rows, keys, max_rows, max_keys, dropout, causal, debug, *, scale):
            self.forward += 1
            shapes = on_meta(
                aten._flash_attention_forward, query, key, value, rows, keys, max_rows, max_keys, dropout, causal,
                debug, scale=scale,
            )  # fmt: skip
            output, lse = varlen_forward(query, key, value, rows, keys, max_rows, max_keys, causal, scale)
            assert shapes[:2] == [output.shape, lse.shape]
            return output, lse, torch.zeros(2), torch.zeros(()), torch.zeros(0)

        def backward(
            grad, query, key, value, output, lse, rows, keys, max_rows, max_keys, dropout, causal, seed, offset, *,
            scale,
        ):  # fmt: skip
            self.backward += 1
            found = varlen_backward(grad, query, key, value, output, lse, rows, keys, causal, scale)
            shapes = on_meta(
                aten._flash_attention_backward, grad, query, key, value, output, lse, rows, keys, max_rows, max_keys,
                dropout, causal, seed, offset, scale=scale,
            )  # fmt: skip
            assert shapes == [x.shape for x in found]
            return found

        return TorchFlashKernel(forward, backward)

    def flash_attn(self):
        """Signatures of flash-attn 2.7 and 2.8, flash_attn/flash_attn_interface.py."""

        def forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        ):  # fmt: skip
            self.forward += 1
            assert dropout_p == 0
            output, lse = varlen_forward(
                q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale
            )
            return output, lse, torch.empty(0), torch.empty(2)

        def backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
            deterministic, rng_state=None,
        ):  # fmt: skip
            self.backward += 1
            assert (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0.0, None)
            found = varlen_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale)
            for place, states in zip((dq, dk, dv), found, strict=True):
                place.copy_(states)
            return torch.empty(0)

        return FlashAttnKernel(forward, backward)


# ---- tests ----


@pytest.mark.parametrize("kind", ["torch_flash", "flash_attn"])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
def test_varlen_kernels_equal_the_dense_mask_in_two_calls_each_way(kind, heads, monkeypatch):
    calls = Calls()
    kernel = getattr(calls, kind)()
    monkeypatch.setattr(attention, "kernel_for", lambda query: kernel)
    inputs = tensors(heads=heads[0], key_heads=heads[1])
    found, wanted = shared_prefix_attention(*inputs, SPANS, 0.3), dense(*inputs, SPANS, 0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(grads_of(found, inputs), grads_of(wanted, inputs), strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
    assert (calls.forward, calls.backward) == (2, 2)  # whatever the number of groups and completions


def test_groups_of_one_completion_need_one_call(monkeypatch):
    calls = Calls()
    kernel = calls.torch_flash()
    monkeypatch.setattr(attention, "kernel_for", lambda query: kernel)
    spans = (GroupSpan(0, 7, (3,)), GroupSpan(10, 1, (1,)), GroupSpan(12, 5, (0, 4)))
    inputs = tensors(spans, 21)
    found, wanted = shared_prefix_attention(*inputs, spans, 0.3), dense(*inputs, spans, 0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    grads_of(found, inputs)
    assert (calls.forward, calls.backward) == (1, 1)


def test_completions_of_one_token_do_not_take_the_kernels_path_for_single_queries(monkeypatch):
    kernel = Calls().torch_flash()
    monkeypatch.setattr(attention, "kernel_for", lambda query: kernel)
    spans = (GroupSpan(0, 1, (1, 1, 1)),)
    inputs = tensors(spans, 4, heads=4, key_heads=4)
    found, wanted = shared_prefix_attention(*inputs, spans, 0.3), dense(*inputs, spans, 0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_varlen_kernels_take_the_heads_that_ulysses_deals(ranks, monkeypatch):
    """28 query and 4 key heads, padded and dealt to ranks: strided views, as `SequenceParallel.to_heads` returns."""
    kernel = Calls().torch_flash()
    monkeypatch.setattr(attention, "kernel_for", lambda query: kernel)
    inputs = [x.detach() for x in tensors(heads=28, key_heads=4)]
    plan = HeadLayout.make(28, 4, ranks)
    dealt = plan.scatter(*inputs).view(ranks, plan.per_rank, plan.size + 2, LENGTH, -1)
    parts = [
        shared_prefix_attention(part[:, :-2].flatten(0, 1), part[:, -2], part[:, -1], SPANS, 0.3) for part in dealt
    ]
    found = plan.gather(torch.cat(parts).view(ranks * plan.per_rank, plan.size, LENGTH, -1))
    torch.testing.assert_close(found.double(), dense(*inputs, SPANS, 0.3), rtol=1e-5, atol=1e-6)


def test_transposed_states_reach_the_kernel_without_a_copy():
    """Layers lay states out as [rows, heads, D]: what the kernel sees must be that memory."""
    seen = []

    def forward(query, *arguments, **options):
        seen.append(query)
        return query, query.new_zeros(query.shape[1::-1])

    query = torch.randn(9, 4, 8).transpose(0, 1)
    TorchFlashKernel(forward, forward).forward(query, query, query, VarlenBatch((9,), (9,), True), 1.0)
    assert seen[0].data_ptr() == query.data_ptr()
    assert seen[0].is_contiguous()


def test_the_fastest_kernel_is_chosen_once_and_said(caplog, monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels._select_kernel.cache_clear()
    with caplog.at_level("INFO", kernels.logger.name):
        first, second = kernel_for(torch.zeros(1, 1, 8)), kernel_for(torch.ones(1, 2, 8))
    assert isinstance(first, CpuFlashKernel)
    assert first is second
    (record,) = caplog.records
    assert record.message == "attention on cpu in torch.float32 with heads of size 8: cpu_flash"


def test_a_kernel_can_be_forced_and_one_that_cannot_run_is_an_error(monkeypatch):
    for name in ("eager", "portable"):  # the latter is its former name
        monkeypatch.setenv(kernels.VARIABLE, name)
        assert isinstance(kernel_for(torch.zeros(1, 1, 8)), EagerKernel)
    monkeypatch.setenv(kernels.VARIABLE, "flash_attn")
    with pytest.raises(ValueError, match=r"LONGRL_ATTENTION must be auto .* are cpu_flash, eager; got 'flash_attn'"):
        kernel_for(torch.zeros(1, 1, 8))


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "package", "names"),
    [
        (torch.bfloat16, 128, (9, 0), "2.8.3.post2", ["flash_attn", "torch_flash", "eager"]),
        (torch.bfloat16, 128, (8, 0), None, ["torch_flash", "eager"]),
        (torch.float32, 128, (9, 0), "2.8.3", ["eager"]),
        (torch.bfloat16, 12, (9, 0), "2.8.3", ["eager"]),
        (torch.float16, 128, (7, 5), "2.8.3", ["eager"]),
    ],
)
def test_flash_needs_half_precision_ampere_and_heads_in_eights(dtype, size, capability, package, names, monkeypatch):
    on_cuda(monkeypatch, capability)
    installed(monkeypatch, {"flash-attn": package} if package else {})
    assert list(kernels._available_kernels(torch.device("cuda"), dtype, size)) == names


def on_cuda(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def installed(monkeypatch, versions):
    """Stands for the distributions of an environment."""

    def version(name):
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(kernels, "version", version)


def test_flash_attn_4_is_not_taken_for_flash_attn_2(monkeypatch, tmp_path):
    """Its wheel has `flash_attn/cute` and no `flash_attn/__init__.py`: a namespace package of the same name."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    info = tmp_path / "flash_attn_4-4.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    on_cuda(monkeypatch)
    assert list(kernels._available_kernels(torch.device("cuda"), torch.bfloat16, 128)) == ["torch_flash", "eager"]


@pytest.mark.parametrize(
    ("version", "taken"),
    [("2.6.3", False), ("2.7.0.post2", True), ("2.8rc1", True), ("2.10", True), ("3.0", False)],
)
def test_flash_attn_of_another_interface_is_left_alone_and_said(version, taken, monkeypatch, caplog):
    on_cuda(monkeypatch)
    installed(monkeypatch, {"flash-attn": version})
    found = kernels._available_kernels(torch.device("cuda"), torch.bfloat16, 128)
    assert ("flash_attn" in found) == taken
    assert [record.message for record in caplog.records] == (
        [] if taken else [f"flash-attn {version} is not used: longrl calls the interface of 2.7 and newer, below 3"]
    )


@pytest.mark.parametrize(
    ("dtype", "size", "capability", "names"),
    [
        (torch.bfloat16, 80, (9, 0), ["torch_flash3", "torch_flash", "eager"]),
        (torch.float32, 80, (9, 0), ["eager"]),
        (torch.bfloat16, 80, (8, 6), ["torch_flash", "eager"]),
        (torch.bfloat16, 80, (10, 0), ["torch_flash", "eager"]),
    ],
)
def test_flash_attention_3_needs_hopper(dtype, size, capability, names, monkeypatch):
    on_cuda(monkeypatch, capability)
    installed(monkeypatch, {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "flash_attn_interface" else None)
    assert list(kernels._available_kernels(torch.device("cuda"), dtype, size)) == names


def test_flash_attention_3_that_does_not_load_is_said_and_left(caplog, monkeypatch):
    """A wheel for another torch or CUDA; it is asked for by name, or found."""

    def fails(name):
        raise RuntimeError("Module 'flash_attn_interface' does not expose FA3 backward kernels")

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", fails)
    available = {"torch_flash3": TorchFlash3Kernel, "eager": EagerKernel}
    monkeypatch.setattr(kernels, "_available_kernels", lambda *states: available)
    states = (torch.device("cpu"), torch.float32, 16)
    kernels._select_kernel.cache_clear()
    assert isinstance(kernels._select_kernel(*states, "auto"), EagerKernel)
    assert "attention by torch_flash3 is not possible: flash_attn_interface does not load" in caplog.text
    with pytest.raises(kernels.KernelNotUsable, match="backward kernels"):
        kernels._select_kernel(*states, "torch_flash3")
    kernels._select_kernel.cache_clear()


def test_flash_attention_3_is_switched_on_in_torch_once_and_said(caplog, monkeypatch):
    """The switch puts its kernels behind the operators that are called anyway."""
    switched = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", switched.append)
    monkeypatch.setattr(kernels, "_available_kernels", lambda *states: {"torch_flash3": TorchFlash3Kernel})
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels._select_kernel.cache_clear()
    with caplog.at_level("INFO", kernels.logger.name):
        first, second = kernel_for(torch.zeros(1, 1, 16)), kernel_for(torch.zeros(2, 1, 16))
    kernels._select_kernel.cache_clear()
    assert switched == ["FA3"]
    assert first is second
    assert first.forward_op is torch.ops.aten._flash_attention_forward
    assert first.backward_op is torch.ops.aten._flash_attention_backward
    assert caplog.messages == ["attention on cpu in torch.float32 with heads of size 16: torch_flash3"]

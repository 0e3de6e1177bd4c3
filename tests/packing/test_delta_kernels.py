"""Which kernel computes the gated delta rule, and what flash-linear-attention is asked; it does not run here."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from longrl.packing import delta_kernels
from longrl.packing.delta_kernels import VARIABLE, EagerDeltaKernel, FlaDeltaKernel, convolve, delta_kernel_for

HEADS, KEY_SIZE, VALUE_SIZE = 3, 4, 8


@pytest.fixture(autouse=True)
def chosen_anew():
    delta_kernels._select_kernel.cache_clear()
    delta_kernels._has_conv_kernel.cache_clear()
    yield
    delta_kernels._select_kernel.cache_clear()


class StandIn:
    """flash-linear-attention's operators by plain tensor operations, with what they were given."""

    def __init__(self):
        self.calls = []

    def __call__(self, query, key, value, *, g, beta, initial_state, cu_seqlens, **options):
        assert options == {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        assert query.shape[0] == key.shape[0] == value.shape[0] == g.shape[0] == beta.shape[0] == 1
        assert g.dtype == initial_state.dtype == torch.float32
        lengths = tuple(cu_seqlens.diff().tolist())
        self.calls.append(lengths)
        output, final = EagerDeltaKernel().rule(query[0], key[0], value[0], g[0], beta[0], lengths, initial_state)
        return output[None], final


def inputs(num_rows, num_sequences, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    keys = [torch.randn(num_rows, HEADS, KEY_SIZE, generator=draw).to(dtype) for _ in range(2)]
    value = torch.randn(num_rows, HEADS, VALUE_SIZE, generator=draw).to(dtype)
    decay = -torch.rand(num_rows, HEADS, generator=draw)
    beta = torch.rand(num_rows, HEADS, generator=draw).to(dtype)
    return (*keys, value, decay, beta), torch.randn(num_sequences, HEADS, KEY_SIZE, VALUE_SIZE, generator=draw)


def test_all_sequences_are_one_call_of_flash_linear_attention():
    rule, step = StandIn(), StandIn()
    kernel = FlaDeltaKernel(rule, step, conv_op=lambda *_, **__: None)
    rows, state = inputs(12, 3)
    found = kernel.rule(*rows, (7, 1, 4), state)
    expected = EagerDeltaKernel().rule(*rows, (7, 1, 4), state)
    assert rule.calls == [(7, 1, 4)]
    assert step.calls == []
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_token_of_every_completion_is_a_recurrent_step_unless_gradients_are_asked_for():
    rule, step = StandIn(), StandIn()
    kernel = FlaDeltaKernel(rule, step, conv_op=lambda *_, **__: None)
    rows, state = inputs(3, 3)
    with torch.no_grad():
        kernel.rule(*rows, (1, 1, 1), state)
    assert (rule.calls, step.calls) == ([], [(1, 1, 1)])
    kernel.rule(*rows, (1, 1, 1), state)
    assert rule.calls == [(1, 1, 1)]


def test_causal_conv1d_is_given_all_rows_in_one_call(caplog):
    def conv_op(hidden, weight, bias, activation):
        assert hidden.shape == (1, 16, 9)
        assert hidden.stride(1) == 1, "channels lie side by side"
        assert 2 <= weight.shape[1] <= 4
        assert (bias, activation) == (None, "silu")
        padded = torch.nn.functional.pad(hidden, (3, 0))
        return torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight[:, None], groups=16))

    rows, weight = torch.randn(9, 16), torch.randn(16, 4)
    kernel = FlaDeltaKernel(StandIn(), StandIn(), conv_op)
    torch.testing.assert_close(kernel.conv(rows, weight), convolve(rows, weight))
    assert kernel.conv(rows, weight).shape == (6, 16)
    # Numbers of channels and of taps that causal-conv1d refuses.
    assert kernel.conv(rows[:, :15], weight[:15]).shape == (6, 15)
    for taps in (1, 5):
        assert kernel.conv(rows, torch.randn(16, taps)).shape == (10 - taps, 16)
    assert kernel.conv(rows, torch.randn(16, 5)).shape == (5, 16)
    said = [record.message for record in caplog.records if "torch's convolution" in record.message]
    assert [message.split(":")[0] for message in said] == [
        f"causal-conv1d takes no {channels} channels by {taps} taps" for channels, taps in ((15, 4), (16, 1), (16, 5))
    ]


FLA, TRITON, TILELANG = "flash-linear-attention", "triton", "tilelang"


def pretend(monkeypatch, installed, capability=(9, 0)):
    """These distributions alone, and a GPU of this capability."""

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(delta_kernels, "version", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


@pytest.mark.parametrize(
    ("installed", "capability", "expected", "says"),
    [
        ({FLA: "0.6.0", TRITON: "3.7.1"}, (9, 0), "fla", None),
        ({FLA: "0.6.0", TRITON: "3.6.0"}, (8, 0), "fla", None),
        ({FLA: "0.6.0", TRITON: "3.6.0", TILELANG: "0.1.9"}, (9, 0), "fla", None),
        ({FLA: "0.6.0", TRITON: "3.6.0"}, (9, 0), "eager", "install Triton 3.7.1 or newer, or tilelang"),
        ({FLA: "0.3.2", TRITON: "3.7.1"}, (9, 0), "eager", "0.4.0 and newer, and 0.3.2 is installed"),
        ({}, (9, 0), "eager", "not installed"),
    ],
)
def test_the_kernel_is_chosen_once_and_said(monkeypatch, caplog, installed, capability, expected, says):
    pretend(monkeypatch, installed, capability)
    monkeypatch.setattr(delta_kernels, "FlaDeltaKernel", StandIn)
    with caplog.at_level(logging.INFO):
        kernel = delta_kernels._select_kernel(torch.device("cuda"), torch.bfloat16, "auto")
    assert isinstance(kernel, StandIn if expected == "fla" else EagerDeltaKernel)
    assert f"gated delta rule on cuda in torch.bfloat16: {expected}" in caplog.text
    assert says is None or says in caplog.text


def test_single_precision_stays_single_precision_on_a_gpu(monkeypatch):
    pretend(monkeypatch, {FLA: "0.6.0", TRITON: "3.7.1"})
    kernel = delta_kernels._select_kernel(torch.device("cuda"), torch.float32, "auto")
    assert isinstance(kernel, EagerDeltaKernel)


def test_a_kernel_that_does_not_run_here_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fla")
    with pytest.raises(ValueError, match=f"{VARIABLE} must be auto or a kernel that runs in torch.float32 on cpu"):
        delta_kernel_for(torch.zeros(1))


@pytest.mark.gpu
def test_flash_linear_attention_is_the_plain_rule_on_a_gpu():
    """Also where sequences begin in a state and end within a chunk; tolerance is that of bfloat16."""
    problem = delta_kernels._problem_of_fla(torch.device("cuda"))
    if problem:
        pytest.skip(problem)
    lengths = (130, 1, 3, 64)
    draw = torch.Generator().manual_seed(0)
    keys = [torch.randn(sum(lengths), 4, 64, generator=draw) for _ in range(3)]
    gates = [-torch.rand(sum(lengths), 4, generator=draw), torch.rand(sum(lengths), 4, generator=draw)]
    state = torch.randn(len(lengths), 4, 64, 64, generator=draw)
    found = []
    for kernel in (FlaDeltaKernel(), EagerDeltaKernel()):
        tensors = [each.cuda().bfloat16().requires_grad_() for each in keys]
        start = state.cuda().requires_grad_()
        output, final = kernel.rule(*tensors, gates[0].cuda(), gates[1].cuda().bfloat16(), lengths, start)
        (output.float().sum() + final.square().sum()).backward()
        found.append([output, final, *(each.grad for each in (*tensors, start))])
    for ours, theirs in zip(*found, strict=True):
        assert (ours.float() - theirs.float()).norm() < 0.02 * theirs.float().norm()

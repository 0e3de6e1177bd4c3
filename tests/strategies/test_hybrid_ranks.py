"""Gated delta nets on many ranks: any grid gives the loss and every gradient of one process that packs alike.

That packed groups of one process are one forward per completion, tests/models/test_qwen3_5.py says. Gradients of decays
may differ as much as chunks of another size change them on one process; in float64 they are the same
(tests/packing/test_delta_net.py).
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from longrl.packing import delta_kernels
from longrl.testing.plain_forward import decay_noise
from longrl.types import FULL_SHARD, Batch
from tests.distributed import run_distributed
from tests.families import proves
from tests.modules.test_policy import disturb_text, policy_of, train
from tests.strategies.test_mr_sp import Case, Encode, on_every_rank, taught
from tests.tiny import assert_same_gradients


def on_one_process(case: Case) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients without a strategy, micro-batches of the same budget."""
    policy = policy_of(case.family(), algorithm=case.algorithm(), max_tokens_per_micro_batch=case.budget)
    groups = case.groups()
    batch = Batch([group.prompt for group in groups], groups=groups)
    if case.sft:
        batch = Batch(taught(case, FULL_SHARD))
    before = disturb_text if case.kl or case.lora else lambda policy: None
    seen = train(policy, batch, before=before, callbacks=[] if case.sft else [Encode()])
    return seen.metrics[-1]["train/loss"], seen.gradients[-1]


def check(cases: list[Case], devices: int) -> None:
    found = run_distributed(on_every_rank, devices, cases, devices)
    for place, case in enumerate(cases):
        loss, expected = on_one_process(case)
        with mock.patch.object(delta_kernels, "CHUNK_ROWS", 32):
            noise = decay_noise(on_one_process(case)[1], expected)
        for metrics, grads in (rank[place] for rank in found):
            assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-7), case
            used = {name: grad for name, grad in grads.items() if name in expected or grad.any()}
            assert_same_gradients(used, expected, 1e-5, noise)


@proves("SP", "qwen3.5", "qwen3.5-text")
def test_ranks_share_sequences_of_states():
    """6 value heads on 2 key heads: a rank has 2 of them, and a key head may be on two ranks."""
    devices = 3
    cases = [
        Case(model="qwen3.5", sp=devices, budget=200, kl=True),
        Case(model="qwen3.5 text", sp=devices, prompts="text", checkpointing=True),
        Case(model="qwen3.5", sp=devices, sft=True, freeze=True),
        Case(model="qwen3.5", sp=devices, budget=420, turns=True),
        Case(model="qwen3.5", sp=devices, lora=True, freeze=True),
    ]
    check(cases, devices)


@proves("SP", "qwen3.5-moe")
def test_more_ranks_than_value_heads_divide():
    cases = [
        Case(model="qwen3.5 text", sp=4, prompts="text"),  # 2 of 8 heads are filled up
        Case(model="qwen3.5 text", sp=2, prompts="text", budget=64),
        Case(model="qwen3.5 experts", sp=4, freeze=True),
    ]
    check(cases, 4)

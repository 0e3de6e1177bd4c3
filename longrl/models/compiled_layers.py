"""Layers of the text stack compiled by torch: norms, rotary embeddings, SwiGLU and residual sums as fused kernels.

A layer reads and writes its hidden states some ten times between matrix products; compiled, these steps are two or
three kernels. Attention stays what it is, and so does an MLP in pieces: a graph ends before them and another begins
behind (`torch.compiler.disable` at their definition). Layers are compiled in place (`nn.Module.compile`): names of
weights, shards, hooks and checkpointing around a layer do not change. All layers share the graphs of the first, in
which lengths are symbols: neither more layers nor other layouts and lengths cost another compilation.

Results differ by rounding. The other way to fused kernels, liger-kernel 0.8, replaces functions in transformers'
modules even for a single model (`_apply_liger_kernel_to_instance`), and so for every other model in the process.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import nn

from longrl.models.chunked_mlp import ChunkedMLP

if TYPE_CHECKING:
    from longrl.models.base import CausalFamily

logger = logging.getLogger(__name__)

MAX_GRAPHS = 64
"""Of one function."""


def compile_layers(family: CausalFamily, model: nn.Module) -> nn.Module:
    """Has every layer of the text stack compiled when it first runs, in place, if the family asks for it.

    On a CPU that needs a C++ compiler. Whoever replaces children of layers must come first.
    """
    if not family.compile_layers:
        return model
    # Behind torch's own limit of 8 a function runs as it is written. A layer's graphs differ by whether it records
    # gradients, trains, has adapters on, and is given a view, as from FSDP's hooks and not when it is recomputed.
    torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    layers = family.layers(model)
    for layer in layers:
        layer.compile(dynamic=True)
        for module in layer.modules():
            if isinstance(module, ChunkedMLP):
                module.compile(dynamic=True)
    logger.info("%d layers of the text stack are compiled when they first run", len(layers))
    return model

"""MLPs that compute a long row of tokens piece by piece, for their intermediate results are the widest of a model.

An MLP of width F makes four tensors of [L, F] on its way and two more in its backward pass: for the 7B's 18,944 and
256k tokens in bfloat16 that is 58 GB in every layer. In pieces of 8,192 tokens it is 1.9 GB, for one more forward pass
of the MLP per update. The result is the same: an MLP sees one token at a time. (TiledMLP in ALST, arXiv:2506.13996.)

A weight's gradient is then the sum of those of the pieces, in the precision of computing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from longrl.models.expert_routing import by_pieces

if TYPE_CHECKING:
    from longrl.models.base import CausalFamily

OPTION = "model.family.init_args.mlp_chunk_tokens"


class ChunkedMLP(nn.Module):
    """A layer's MLP that computes some tokens at a time; its children are those of that MLP, under the same names.

    So names in a `state_dict`, shards and exports stay what they were. Whoever replaces children, as LoRA does, must
    come first.

    Args:
        mlp: maps [..., L, D] to the same shape, each token for itself; all weights are its children's.
        max_tokens: computed together.
    """

    _mlp: nn.Module

    def __init__(self, mlp: nn.Module, max_tokens: int) -> None:
        super().__init__()
        if any(True for _ in mlp.parameters(recurse=False)):
            raise ValueError(
                f"{OPTION} needs weights in linear layers, but {type(mlp).__name__} holds its own; set it to null"
            )
        for name, child in mlp.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "_mlp", mlp)  # past nn.Module's registration
        self.max_tokens = max_tokens

    @override
    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Has the MLP compiled that computes a piece, not the loop over pieces."""
        self._mlp.compile(*args, **kwargs)

    @torch.compiler.disable  # a layer that is compiled would be so for every number of pieces anew
    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """[..., L, D] -> [..., L, D]; the backward pass computes a piece again instead of keeping it."""
        mlp = self._mlp
        if hidden.shape[-2] <= self.max_tokens:
            return mlp(hidden)
        pieces = hidden.split(self.max_tokens, dim=-2)
        runs = by_pieces(mlp, [piece.shape[-2] for piece in pieces])
        outputs = [checkpoint(run, piece, use_reentrant=False) for run, piece in zip(runs, pieces, strict=True)]
        return torch.cat(outputs, dim=-2)


def chunk_mlps(family: CausalFamily, model: nn.Module) -> nn.Module:
    """Puts a `ChunkedMLP` into every layer of the text stack, in place, if the family asks for it."""
    if family.mlp_chunk_tokens is None:
        return model
    for layer in family.layers(model):
        mlp = getattr(layer, "mlp", None)
        if not isinstance(mlp, nn.Module):
            raise ValueError(
                f"{OPTION} needs layers with an `mlp`, but {type(layer).__name__} has none; set it to null"
            )
        layer.add_module("mlp", ChunkedMLP(mlp, family.mlp_chunk_tokens))
    return model

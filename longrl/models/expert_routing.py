"""Routers of a mixture of experts: which experts a forward pass chose, and a forward pass with given ones.

Small differences between engine and trainer flip choices of experts, and log-probabilities then differ by more than any
rounding. So the experts that the engine chose are used in the update (rollout routing replay, R3, arXiv:2510.11370):
the router's logits are the trainer's own, the gates' weights are computed from them at the given experts, normalised as
the model does, and gradients flow through them.

No class of transformers is replaced. A layer takes `expert_rows` among its keywords, where a hook of ours hands the
layer's part to its router, whose output a second hook reads or replaces. As keywords of the layer they are there again
when gradient checkpointing recomputes it. Names in a `state_dict`, shards and adapters stay what they were.

Letters: l rows of one rank, M layers with a mixture of E experts, of which each token uses k.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longrl.types import ExpertLoad

if TYPE_CHECKING:
    from longrl.models.base import TextStack

logger = logging.getLogger(__name__)

KEYWORD = "expert_rows"
"""Of a layer, and the attribute of a router."""
OPTION = "rollout.router_replay"


@dataclass(frozen=True)
class RouterRows:
    """The rows of one router: what it is given, and where it leaves what it chose."""

    given: Tensor | None
    """[l, k] experts to be used, -1 where the router's own are; None is everywhere."""
    chosen: Tensor
    """[l, k], written by every forward pass, a recomputed one the same again."""

    def piece(self, start: int, stop: int) -> RouterRows:
        """Rows start..stop of them."""
        given = None if self.given is None else self.given[start:stop]
        return RouterRows(given, self.chosen[start:stop])


@dataclass(frozen=True)
class ExpertRows:
    """The rows of all routers in one forward pass."""

    given: Tensor | None
    """[l, M, k], -1 where a router's own choice stands; None is everywhere."""
    chosen: Tensor
    """[l, M, k] int16: the routers' own choice, once the forward pass has run."""
    num_experts: int

    def of_router(self, index: int) -> RouterRows:
        """Those of the router of the M that has this number."""
        given = None if self.given is None else self.given[:, index]
        return RouterRows(given, self.chosen[:, index])

    def load(self, num_rows: int) -> ExpertLoad:
        """Sums over the first rows, those behind them being padding; a GPU is not waited for."""
        num_rows = max(num_rows, 0)
        counts = []
        replayed = self.chosen.new_zeros((), dtype=torch.float64)
        differing = torch.zeros_like(replayed)
        for index in range(self.chosen.shape[1]):  # layer by layer: all together are large
            rows = self.of_router(index).piece(0, num_rows)
            used = rows.chosen.long()
            if rows.given is not None:
                given = rows.given.long()  # [l, k]
                is_given = given >= 0
                is_chosen = (given[:, :, None] == used[:, None, :]).any(-1)
                replayed += is_given.sum()
                differing += (is_given & ~is_chosen).sum()
                used = torch.where(is_given, given, used)
            flat = used.flatten()
            ones = torch.ones_like(flat, dtype=torch.float64)
            counts.append(ones.new_zeros(self.num_experts).scatter_add_(0, flat, ones))
        return ExpertLoad(torch.stack(counts), replayed, differing)


def num_experts(family: TextStack) -> int:
    """E of the text stack, 0 of a dense one."""
    return getattr(family.config.get_text_config(), "num_experts", None) or 0


# -- a forward pass ----------------------------------------------------------------------------------------------


def expert_rows(family: TextStack, model: Any, num_rows: int, given: Tensor | None = None) -> ExpertRows | None:
    """What a forward pass over so many rows hands to the layers, None if there is nothing to hand.

    Args:
        family: of the model.
        model: made by `build`.
        num_rows: l.
        given: [l, M, k] experts to be used, -1 where the routers' own choice stands.

    Raises:
        ValueError: experts are given for another model, or one whose routers compute something else.
    """
    routers = [] if family.compile_layers else watched_routers(family.layers(model))
    if given is not None:
        check_given(routers, given)
    if not routers:
        return None
    device = model.get_input_embeddings().weight.device  # shards of the layers may be kept in host memory
    chosen = torch.full((num_rows, len(routers), routers[0].top_k), -1, dtype=torch.int16, device=device)
    return ExpertRows(given, chosen, routers[0].num_experts)


def layer_inputs(rows: ExpertRows | None) -> dict[str, Any]:
    """Keywords for the layers."""
    return {} if rows is None else {KEYWORD: rows}


def check_given(routers: Sequence[Any], given: Tensor) -> None:
    """Raises ValueError unless these routers can use the experts [l, M, k]."""
    ours = (len(routers), *(router.top_k for router in routers[:1]))
    if tuple(given.shape[1:]) != ours:
        raise ValueError(
            f"experts of {given.shape[1]} layers, {given.shape[2]} for each token, are to be replayed in a model that "
            f"has {' x '.join(map(str, ours))}; engine and trainer read different models: set {OPTION} to false"
        )
    check_gates(routers[0])


def watched_routers(layers: Sequence[Any]) -> list[Any]:
    """The routers of the layers, in order; the first call registers the hooks."""
    if not hasattr(layers[0], "router_name"):
        _register_hooks(layers)
    return [layer.get_submodule(layer.router_name) for layer in layers if layer.router_name is not None]


def _register_hooks(layers: Sequence[Any]) -> None:
    for layer in layers:
        names = [name for name, module in layer.named_modules() if is_router(module)]
        if len(names) > 1:
            raise ValueError(f"{type(layer).__name__} has {len(names)} routers; longrl follows one in each layer")
        layer.router_name = names[0] if names else None
    if not any(layer.router_name for layer in layers):
        return
    index = 0
    for layer in layers:  # those without experts, too: the keyword must not reach what lies below
        layer.register_forward_pre_hook(functools.partial(_hand_rows, index=index), with_kwargs=True)
        if layer.router_name is not None:
            layer.get_submodule(layer.router_name).register_forward_hook(_read_or_replace)
            index += 1


def is_router(module: nn.Module) -> bool:
    """True of transformers' routers: `forward` gives logits, gates' weights and experts of each token."""
    return isinstance(getattr(module, "weight", None), nn.Parameter) and all(
        isinstance(getattr(module, name, None), int) for name in ("top_k", "num_experts")
    )


def _hand_rows(
    layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Takes the rows out of a layer's keywords, which what lies below may not know, and gives them to its router."""
    rows = kwargs.get(KEYWORD)
    if layer.router_name is not None:
        setattr(layer.get_submodule(layer.router_name), KEYWORD, None if rows is None else rows.of_router(index))
    return args, {key: value for key, value in kwargs.items() if key != KEYWORD}


def _read_or_replace(router: Any, args: tuple[Any, ...], output: Any) -> Any:
    rows: RouterRows | None = getattr(router, KEYWORD, None)
    if rows is None:
        return None
    logits, weights, experts = output
    rows.chosen.copy_(experts)
    if rows.given is None:
        return None
    given = rows.given.to(experts)
    used = torch.where(given < 0, experts, given)
    return logits, gate_weights(router, logits, used).to(weights), used


def gate_weights(router: Any, logits: Tensor, experts: Tensor) -> Tensor:
    """[l, k] float32 weights of the given experts [l, k] from a router's logits [l, E]."""
    weights = logits.softmax(-1, dtype=torch.float).gather(-1, experts)
    if getattr(router, "norm_topk_prob", True):  # routers without the option always do
        weights = weights / weights.sum(-1, keepdim=True)
    return weights


@torch.no_grad()
def check_gates(router: Any) -> None:
    """Raises ValueError if a router weighs its experts otherwise than `gate_weights`; asked of each once."""
    if getattr(router, "has_known_gates", False):
        return
    setattr(router, KEYWORD, None)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(router.weight.shape, generator=generator)
    hidden = torch.randn(8, weight.shape[-1], generator=generator)
    with torch.autocast("cpu", enabled=False):
        logits, theirs, experts = torch.func.functional_call(router, {"weight": weight}, (hidden,))
    if not torch.allclose(theirs, gate_weights(router, logits, experts), rtol=1e-5):
        raise ValueError(
            f"{OPTION} knows routers that take the largest of a softmax, and {type(router).__name__} weighs experts "
            f"otherwise; set {OPTION} to false"
        )
    router.has_known_gates = True


# -- pieces ------------------------------------------------------------------------------------------------------


def by_pieces(mlp: nn.Module, sizes: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
    """An MLP once for each piece of its tokens: a mixture's router has the rows of the piece, also when recomputed.

    Args:
        mlp: of one layer.
        sizes: tokens of the pieces, one behind the other.
    """
    router = next((module for module in mlp.modules() if is_router(module)), None)
    rows: RouterRows | None = getattr(router, KEYWORD, None)
    if rows is None:
        return [mlp for _ in sizes]
    runs: list[Callable[[Tensor], Tensor]] = []
    start = 0
    for size in sizes:
        runs.append(functools.partial(_run_piece, mlp, router, rows.piece(start, start + size)))
        start += size
    return runs


def _run_piece(mlp: nn.Module, router: Any, rows: RouterRows, piece: Tensor) -> Tensor:
    setattr(router, KEYWORD, rows)
    return mlp(piece)

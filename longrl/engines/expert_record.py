"""The experts that an engine chose for prompts and completions, for the update to use the same (`router_replay`).

Letters: P prompts, G completions each, T prompt tokens, S completion tokens, M layers with experts, k of a token.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longrl.environments.trajectory import Trajectory
from longrl.models.base import CausalFamily
from longrl.models.expert_routing import ExpertRows, expert_rows, layer_inputs, watched_routers
from longrl.types import Completion


class ExpertRecord:
    """What the routers of the trainer's own model choose while it generates; nothing unless the family asks for it.

    Args:
        family: of the model.
        model: generates.
    """

    def __init__(self, family: CausalFamily, model: nn.Module) -> None:
        self._family = family
        self._model = model
        self._prompts: list[ExpertRows] = []
        self._tokens: list[ExpertRows] = []

    def of_prompts(self, num_rows: int) -> dict[str, Any]:
        """Inputs of a forward pass over the next rows of the packed prompts."""
        return self._inputs(self._prompts, num_rows)

    def of_tokens(self, num_rows: int) -> dict[str, Any]:
        """Inputs of a forward pass over a token of each of P * G completions."""
        return self._inputs(self._tokens, num_rows)

    def _inputs(self, record: list[ExpertRows], num_rows: int) -> dict[str, Any]:
        if not self._family.router_replay:
            return {}
        rows = expert_rows(self._family, self._model, num_rows)
        if rows is None:
            raise ValueError(
                f"rollout.router_replay=true needs routers that longrl knows, and {type(self._model).__name__} has "
                "none (longrl/models/expert_routing.py); set rollout.router_replay to false"
            )
        record.append(rows)
        return layer_inputs(rows)

    def handed_to(self, completions: list[Completion], prompt_lengths: Sequence[int]) -> list[Completion]:
        """The P * G completions with their experts, the first of each prompt also with the prompt's."""
        if not self._prompts:
            return completions
        of_prompts = torch.cat([rows.chosen for rows in self._prompts]).cpu().split(list(prompt_lengths))
        none = self._prompts[0].chosen[:0]
        steps = [rows.chosen for rows in self._tokens]  # [P * G, M, k] each
        of_tokens = torch.stack(steps, 1).cpu() if steps else none.cpu().expand(len(completions), *none.shape)
        group_size = len(completions) // len(prompt_lengths)
        handed = []
        for index, completion in enumerate(completions):
            number, in_group = divmod(index, group_size)
            experts = of_tokens[index, : max(len(completion.token_ids) - 1, 0)].clone()
            prompt = None if in_group else of_prompts[number].clone()
            handed.append(dataclasses.replace(completion, experts=experts, prompt_experts=prompt))
        return handed


class TurnExperts(ExpertRecord):
    """The same of completions of several turns, which read rows of any forward pass.

    Args:
        family: of the model.
        model: generates.
    """

    def __init__(self, family: CausalFamily, model: nn.Module) -> None:
        super().__init__(family, model)
        self._rows: dict[int, list[tuple[ExpertRows, slice]]] = defaultdict(list)

    def assign(self, trajectory: Trajectory, start: int, stop: int) -> None:
        """Rows start..stop of the last pass are the trajectory's next tokens."""
        if self._tokens:
            self._rows[id(trajectory)].append((self._tokens[-1], slice(start, stop)))

    def hand_to(self, groups: Sequence[Sequence[Trajectory]]) -> None:
        """Gives the trajectories of each prompt their experts, the first also the prompt's."""
        if not self._prompts:
            return
        of_prompts = torch.cat([rows.chosen for rows in self._prompts]).cpu()
        start = 0
        for group in groups:
            stop = start + len(group[0].prompt.input_ids)
            group[0].prompt_experts = of_prompts[start:stop].clone()
            start = stop
            for trajectory in group:
                parts = [record.chosen[rows] for record, rows in self._rows[id(trajectory)]]
                trajectory.experts = torch.cat([of_prompts[:0], *(part.cpu() for part in parts)])


def with_routed_experts(
    completion: Completion, routed: Any, num_prompt_tokens: int, layers: Sequence[int], is_first: bool
) -> Completion:
    """A completion with the experts that vLLM returned.

    Args:
        completion: of vLLM.
        routed: [T + S - 1, all layers, k] unsigned integers; vLLM keeps them beside cached keys and values, so that a
            prompt that came from its cache has them too.
        num_prompt_tokens: T.
        layers: numbers of the layers that have experts.
        is_first: of its prompt's completions, it carries the prompt's.

    Raises:
        RuntimeError: vLLM returned none, or those of other tokens.
    """
    expected = num_prompt_tokens + len(completion.token_ids) - 1
    if routed is None or len(routed) != expected:
        got = "none" if routed is None else f"those of {len(routed)} tokens"
        raise RuntimeError(
            f"vLLM was asked for the experts of {expected} tokens and returned {got}; set rollout.router_replay to "
            "false, or use longrl.engines.hf.HFEngine"
        )
    own: Tensor = torch.from_numpy(routed.astype("int16"))[:, list(layers)]  # [T + S - 1, M, k]
    prompt = own[:num_prompt_tokens].clone() if is_first else None
    return dataclasses.replace(completion, experts=own[num_prompt_tokens:].clone(), prompt_experts=prompt)


def expert_layers(family: CausalFamily, model: nn.Module) -> list[int]:
    """Numbers of the layers of the text stack that have experts."""
    layers = family.layers(model)
    watched_routers(layers)
    return [number for number, layer in enumerate(layers) if layer.router_name is not None]

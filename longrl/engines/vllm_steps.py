"""Turns answered by vLLM in the trainer's process: between its steps requests are added and answers looked for."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from longrl.engines.turn_requests import TurnRequests
from longrl.engines.vllm_options import completion_fields
from longrl.engines.vllm_turns import SAMPLED_PLACEHOLDERS, num_tokens_of, restore_placeholders
from longrl.environments.trajectory import Trajectory


class SteppedRequests(TurnRequests):
    """Turns that vLLM answers in this process, step after step (`TurnRequests`).

    Args:
        llm: a `vllm.LLM` that has nothing else to do.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self._pending: dict[str, Trajectory] = {}
        self._names = itertools.count()
        self._items: dict[str, Any] = {}  # media of the rollout as vLLM has rendered them, by their ids

    @override
    def add(self, trajectory: Trajectory, request: dict[str, Any], params: dict[str, Any]) -> None:
        import vllm
        from vllm.sampling_params import RequestOutputKind

        name = f"turn {next(self._names)}"
        sampling = vllm.SamplingParams(**params, output_kind=RequestOutputKind.FINAL_ONLY)
        try:
            with keep_random_states():
                self._llm.llm_engine.add_request(name, render_request(self._llm, request, self._items), sampling)
        except Exception as error:
            raise engine_failure(f"a prompt of {num_tokens_of(trajectory)} tokens", error) from error
        self._pending[name] = trajectory

    @override
    def finished(self, answers: Collection[Future[Any]]) -> list[tuple[Trajectory, dict[str, Any]]]:
        if not self._pending:
            wait(answers, return_when=FIRST_COMPLETED)
            return []
        try:
            with keep_random_states():
                outputs = [output for output in self._llm.llm_engine.step() if output.finished]
        except Exception as error:
            raise engine_failure(f"{len(self._pending)} turns", error) from error
        return [(self._pending.pop(output.request_id), completion_fields(output.outputs[0])) for output in outputs]

    def give_up(self) -> None:
        """Ends what has not been answered; nothing else would let go of it."""
        if self._pending:
            self._llm.llm_engine.abort_request([*self._pending])
            self._pending.clear()


def render_request(llm: Any, request: dict[str, Any], items: dict[str, Any] | None = None) -> dict[str, Any]:
    """A request of ours as `LLM.generate` renders it, with all its placeholder tokens.

    Args:
        llm: a `vllm.LLM`.
        request: see `turn_request`.
        items: media items of earlier requests by their ids, which take the place of equal ones; gets the new ones.
    """
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    plain = {name: value for name, value in request.items() if name != SAMPLED_PLACEHOLDERS}
    parsed = parse_model_prompt(llm.model_config, plain)
    (rendered,) = llm.renderer.render_cmpl([parsed], llm.renderer.default_cmpl_tok_params)
    if items is not None:
        _share_items(rendered, items)
    return restore_placeholders(rendered, request.get(SAMPLED_PLACEHOLDERS, ()))


def _share_items(rendered: dict[str, Any], items: dict[str, Any]) -> None:
    """Has requests share their media items: each brings features of its own, which vLLM keeps until it is answered.

    An item is a slice of a tensor of all: where that is much larger, as behind an hour of video, it gets memory of its
    own.
    """
    for kind, names in rendered.get("mm_hashes", {}).items():
        own = rendered["mm_kwargs"][kind]
        for index, name in enumerate(names):
            if own[index] is None:  # vLLM has it
                continue
            if name not in items:
                for field in own[index].values():
                    rows = field.data
                    if isinstance(rows, torch.Tensor) and rows.untyped_storage().nbytes() > 2 * rows.nbytes:
                        field.data = rows.clone()
                items[name] = own[index]
            own[index] = items[name]


def engine_failure(what: str, error: Exception) -> RuntimeError:
    """An error of vLLM while it answered something, and how the run goes on."""
    return RuntimeError(
        f"vLLM failed while answering {what}: {error}. The last checkpoint resumes the run: the same command with "
        "--ckpt_path RUN/checkpoints/last.ckpt. If memory was short, lower max_num_seqs or max_model_len of VLLMEngine"
    )


@contextlib.contextmanager
def keep_random_states() -> Iterator[None]:
    """The global generators of Python, numpy and torch go on as they were: vLLM seeds them and draws from them."""
    # Lightning's own way with CUDA would open all GPUs of the machine in every process, and restores nothing after an
    # error.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices), contextlib.ExitStack() as after:
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        yield

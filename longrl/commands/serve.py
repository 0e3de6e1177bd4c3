"""`python -m longrl serve`: a vLLM server that a run's `VLLMServerEngine` generates with.

vLLM's own HTTP routes cannot take what the trainer has: the chat and completion routes expand prompts themselves,
`prompt_embeds` are wrong for models with M-RoPE, and `/inference/v1/generate` wants vLLM's processed fields, whose
format is private and which have no mask for placeholders with text between them (Qwen3-VL). So this command starts
vLLM's server as it is, OpenAI routes included, and adds routes beside them that hand `engine_request` to the same
`AsyncLLM.generate` (longrl/engines/server_routes.py). vLLM's developer mode, whose routes let anyone call any method,
stays off.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from longrl.commands.run_parts import RunParts
from longrl.engines.server_key import KEY_VARIABLE, LOOPBACK, MIN_KEY_CHARACTERS, environment_key, key_file, server_key
from longrl.engines.server_protocol import OWN_WEIGHTS
from longrl.engines.server_scores import MAX_TOP
from longrl.engines.vllm_options import INSTALL, VERSION, check_head_dtypes, engine_arguments, model_length
from longrl.engines.weight_adapters import adapter_options
from longrl.engines.weight_files import default_folder
from longrl.io.number_ranges import COUNT, NOT_NEGATIVE, check_ranges
from longrl.models.base import CausalFamily
from longrl.strategies.mr_sp import MRSPStrategy

logger = logging.getLogger(__name__)

DESCRIPTION = """A vLLM server for the rollouts of a run, with the model of the run's own config.
Every request needs the server's key: LONGRL_SERVER_KEY in the environment of server and trainer, or without it one that
the server makes and a trainer of the same user on the same machine finds."""
EXTENSION = "longrl.engines.vllm_extension.WeightSync"


@dataclass(frozen=True)
class ServerOptions:
    """The server's own options."""

    host: str = "127.0.0.1"
    """Address to listen at; the default is for this machine only."""
    port: int = 8000
    """Port to listen at; another one for each server of a machine."""
    max_model_len: int | None = None
    """Tokens of prompt and completion; by default those of data.max_prompt_tokens and sampling.max_completion_tokens,
    or 32768 where prompts are not limited."""
    max_num_seqs: int = 256
    """Completions decoded together; lower it where the cache has no room for so many."""
    gpu_memory_utilization: float = 0.9
    """Share of each GPU's memory that weights and cache may take; lower it where something else runs there."""
    kv_cache_gib: float | None = None
    """Size of the cache of keys and values; by default what `gpu_memory_utilization` leaves. Needed on a CPU."""
    enforce_eager: bool = field(
        default=False, metadata={"help": "Record no CUDA graphs: the server starts sooner and decodes more slowly."}
    )
    feature_cache_gib: float = 8.0
    """Host memory for the features of media, which trainers send once and name afterwards."""
    max_request_gib: float = 8.0
    """Largest request that is read: the prompts and new features of a rank's rollout."""
    weights_folder: Path = field(default_factory=default_folder)
    """Folder in which trainers of this machine leave weights; no others are read."""
    kept_folder: Path = field(default_factory=default_folder)
    """For trainers that send what changed in weights: those of before are kept here, on this machine."""
    lora: Literal["merged", "adapters"] = "merged"
    """adapters: they are given to vLLM beside the weights, as the engine's lora of the run says."""
    weights: Literal["run", "family"] = "run"
    """run: none until a trainer sends its own. family: those that model.family names, for good: a teacher that scores
    what others sample (longrl.modules.server_teacher.ServerTeacher)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of vLLM's server, e.g. {"tensor_parallel_size": 4}."""

    def __post_init__(self) -> None:
        check_ranges(self, "--", port=(1, 65_535), max_model_len=COUNT, max_num_seqs=COUNT)
        check_ranges(self, "--", gpu_memory_utilization=(0.01, 1), kv_cache_gib=NOT_NEGATIVE)
        check_ranges(self, "--", feature_cache_gib=NOT_NEGATIVE, max_request_gib=(1e-6, 1e6))
        if self.weights == "family" and self.lora == "adapters":
            raise ValueError("--weights=family keeps the model's own weights; set --lora to merged")


def main(args: Sequence[str]) -> None:
    """Command line of the server."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ["VLLM_SERVER_DEV_MODE"] = "0"
    parts = RunParts("serve", args, DESCRIPTION, ServerOptions)
    run(trainer_family(parts), fit_lengths(parts, parts.options))


def fit_lengths(parts: RunParts, options: ServerOptions) -> ServerOptions:
    """The options with room for the longest prompt and completion of the run, unless they say how much there is."""
    if options.max_model_len is not None:
        return options
    rollout = parts.planned_run().rollout
    longest = 0 if rollout is None else rollout.longest_completion
    max_model_len = model_length(parts.datamodule.renderer.max_prompt_tokens, longest)
    return replace(options, max_model_len=max_model_len)


def trainer_family(parts: RunParts) -> CausalFamily:
    """The family of a run, in the precision that its trainer computes in."""
    family, run = parts.model.family, parts.planned_run()
    computes = run.strategy.sharding.compute_dtype if isinstance(run.strategy, MRSPStrategy) else None
    mixed = "bfloat16" if run.precision == "bf16-mixed" else None
    family.dtype = computes or mixed or family.dtype
    return family


def run(family: CausalFamily, options: ServerOptions) -> None:
    """Serves until the process is told to end.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an option that vLLM does not know, or a server for others without a good key.
    """
    check_access(options)
    try:
        import uvloop
        import vllm
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    except Exception as error:  # beside the wrong torch it is an OSError or a RuntimeError
        raise ImportError(
            f"python -m longrl serve needs vllm {VERSION}, which cannot be imported ({error}); install it ({INSTALL})"
        ) from error
    if vllm.__version__.split("+")[0] != VERSION:
        logger.warning("this is vllm %s; longrl's server was written for %s", vllm.__version__, VERSION)
    cli_env_setup()
    with server_key(options.port) as key:
        if environment_key() is None:
            logger.info("the server's key is in %s, for trainers of this user on this machine", key_file(options.port))
        uvloop.run(_serve(family, options, server_arguments(family, options, key), key))


def check_access(options: ServerOptions) -> None:
    """Raises ValueError if a server were open to more than those who have its key, or its key to others."""
    for name in ("host", "port"):
        if name in options.options:
            raise ValueError(f"--options has {name!r}; use --{name}, by which server and trainer agree on a key")
    if "api_key" in options.options:
        raise ValueError(
            f"--options has 'api_key', and a command line can be read by everyone on this machine; set {KEY_VARIABLE} "
            "in the environment of server and trainer"
        )
    if options.host in LOOPBACK:
        return
    key = environment_key()
    if key is None or len(key) < MIN_KEY_CHARACTERS:
        problem = "no key" if key is None else f"a key of {len(key)} characters"
        raise ValueError(
            f"--host={options.host} opens the server to other machines, and there is {problem}; set {KEY_VARIABLE} for "
            f"server and trainer to at least {MIN_KEY_CHARACTERS} characters (openssl rand -hex 32), or leave --host "
            "at 127.0.0.1"
        )


def server_arguments(family: CausalFamily, options: ServerOptions, key: str) -> argparse.Namespace:
    """Options as vLLM's own command line would have parsed them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    chosen = {
        **engine_arguments(family, options),
        **(of_own_weights(options) if options.weights == "family" else {}),
        **(adapter_options(family) if options.lora == "adapters" else {}),
        "worker_extension_cls": EXTENSION,
        "host": options.host,
        "port": options.port,
        "disable_uvicorn_access_log": True,
        "api_key": [key],  # else vLLM would want the one of VLLM_API_KEY beside ours
    }
    for name, value in chosen.items():
        if not hasattr(arguments, name):
            raise ValueError(f"--options has {name!r}, which vllm's server does not know; see `vllm serve --help`")
        setattr(arguments, name, value)
    return arguments


def of_own_weights(options: ServerOptions) -> dict[str, Any]:
    """Options of a server that scores by the family's own weights."""
    return {"load_format": "auto", "max_logprobs": MAX_TOP} | options.options


async def _serve(family: CausalFamily, options: ServerOptions, arguments: argparse.Namespace, key: str) -> None:
    """VLLM's `run_server` with our routes added to its app."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.launcher import serve_http, setup_server

    from longrl.engines.server_guard import ServerGuard
    from longrl.engines.server_routes import RolloutRoutes

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while the engine starts; then serve_http takes over
    address, sock = setup_server(arguments, reuse_port=False)
    with contextlib.ExitStack() as after:
        after.callback(sock.close)
        async with build_async_engine_client(arguments) as engine:
            if family.fp32_lm_head:
                dtypes = await engine.collective_rpc("longrl_head_dtypes")
                check_head_dtypes(family, dtypes[0])
            tasks = await engine.get_supported_tasks()
            app = build_app(arguments, tasks, engine.model_config)
            await init_app_state(engine, app.state, arguments, tasks)
            store = int(options.feature_cache_gib * (1 << 30))
            parallel = engine.vllm_config.parallel_config
            routes = RolloutRoutes(
                engine,
                family,
                options.weights_folder,
                store,
                options.max_num_seqs,
                kept_folder=options.kept_folder,
                takes_adapters=options.lora == "adapters",
                num_workers=parallel.world_size * parallel.data_parallel_size,
            )
            if options.weights == "family":
                routes.held.version = OWN_WEIGHTS
            after.callback(routes.held.close)
            app.include_router(routes.router())
            # Around all of vLLM's middleware, whose own check guards some of its routes only and lets OPTIONS through.
            stack = app.middleware_stack or app.build_middleware_stack()
            app.middleware_stack = ServerGuard(stack, key, int(options.max_request_gib * (1 << 30)))
            logger.info("serving %s at %s", family.model_path, address)
            ended = await serve_http(
                app, sock=sock, host=arguments.host, port=arguments.port, log_level="warning", access_log=False
            )
        await ended

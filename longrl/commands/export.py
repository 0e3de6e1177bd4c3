"""`python -m longrl export`: a run's checkpoint as an ordinary Hugging Face folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, auto_cli

from longrl.commands.closing import end_of_export, say_end
from longrl.commands.parsers import ShortErrors
from longrl.commands.run_config import read_run_config
from longrl.commands.run_settings import write_record
from longrl.commands.run_trust import check_run_config
from longrl.diffusion.diffusion_family import DiffusionFamily
from longrl.io.atomic import atomic_folder
from longrl.io.checkpoint_files import trust_checkpoints
from longrl.io.hub import check_target, push
from longrl.io.weight_folder import write_weight_checksums
from longrl.models.base import CausalFamily
from longrl.models.ema import holds_ema
from longrl.models.lora import OPTION
from longrl.modules.initial_weights import find_checkpoint, plain_from, read_adapters, saved_step
from longrl.types import Dtype

logger = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Command line of `export_run`."""
    auto_cli(export_run, args=list(args), as_positional=False, parser_class=ShortErrors, prog="python -m longrl export")


def export_run(
    run: str,
    out: str,
    checkpoint: str | None = None,
    dtype: Dtype | None = None,
    adapter: bool = False,
    raw_weights: bool = False,
    trust_checkpoint: bool = False,
    push_to: str | None = None,
    private: bool = True,
    trust_run_config: bool = False,
) -> None:
    """Writes weights, config, tokenizer and processor so that `from_pretrained` and vLLM load them.

    Of a diffusion model a whole pipeline is written, which diffusers loads.

    Of a run with `model.ema` the moving averages are written, which its validation read.

    Adapters of a LoRA run are merged into the weights, exactly with `--dtype float32`: bfloat16 rounds small changes
    away.

    Args:
        run: folder of a training run, with its `config.yaml`.
        out: folder to write; it must not exist yet.
        checkpoint: which checkpoint; None is `checkpoints/last.ckpt`.
        dtype: precision to save in; None keeps the run's.
        adapter: write a LoRA run's adapters alone, as peft's `PeftModel.from_pretrained` reads them.
        raw_weights: write the last step's weights, not their moving averages, of a run with `model.ema`.
        trust_checkpoint: read a checkpoint also if it names functions and classes, which may run any code.
        push_to: repository of a Hugging Face hub, `owner/name`, that the written folder is uploaded to; made if
            missing. Nothing is uploaded by default.
        private: make that repository a private one; false shows it to everyone.
        trust_run_config: the run's config may name a family of any module, whose code then runs.
    """
    if push_to is not None:
        check_target(push_to)
    if Path(out).exists():
        raise ValueError(f"--out={out} exists already; name a new folder")
    trust_checkpoints(trust_checkpoint)
    family = family_of(run, trust_run_config)
    source = (run, "--run") if checkpoint is None else (checkpoint, "--checkpoint")
    with atomic_folder(out, replace=False) as folder:
        averaged = not raw_weights and _says_averaged(*source)
        if adapter:
            _write_adapter(family, run, source, folder, dtype, averaged)
        else:
            family.dtype = dtype or family.dtype  # adapters are merged in it
            family.export(plain_from(family, *source, averaged), folder)
            if isinstance(family, CausalFamily):
                write_record(folder, run)
        write_weight_checksums(folder)
    checkpoint_file = find_checkpoint(*source)
    step = None if checkpoint_file is None else saved_step(checkpoint_file)
    saved_in = (dtype or "float32") if adapter else family.dtype
    end_of_export(out, run, step, saved_in, _loader(family, out, _base(run) if adapter else None))
    if push_to is not None:
        say_end([f"pushed: {push(out, push_to, private)}"])


def _loader(family: CausalFamily | DiffusionFamily, out: str, base: str | None) -> str:
    """Python that loads an exported folder.

    Args:
        family: of the run.
        out: the folder.
        base: the weights that adapters belong to, if these were exported alone.
    """
    if isinstance(family, DiffusionFamily):
        return f"diffusers.{family.pipeline_class}.from_pretrained({out!r})"
    auto_class = family.auto_class()
    package = auto_class.__module__.partition(".")[0]
    if package != "transformers":
        return f"`python -m longrl evaluate --policy.init_args.weights {out}`: transformers has no class for it"
    if base is None:
        return f"transformers.{auto_class.__name__}.from_pretrained({out!r}, dtype='auto')"
    return f"peft.PeftModel.from_pretrained(transformers.{auto_class.__name__}.from_pretrained({base!r}), {out!r})"


def _says_averaged(source: str, option: str) -> bool:
    """True, and said, if a checkpoint has moving averages."""
    checkpoint = find_checkpoint(source, option)
    if checkpoint is None or not holds_ema(checkpoint):
        return False
    logger.info("these are the moving averages (EMA) of the trained weights; --raw_weights true writes the weights")
    return True


def _write_adapter(
    family: CausalFamily | DiffusionFamily,
    run: str,
    source: tuple[str, str],
    folder: Path,
    dtype: Dtype | None,
    averaged: bool,
) -> None:
    """Adapters as peft, or of a diffusion model diffusers, loads them onto the weights that the run began with."""
    if family.lora is None:
        raise ValueError(f"--adapter=true needs a run with {OPTION}, which {run} is not; leave it out")
    precision = getattr(torch, dtype or "float32")
    kept = {name: value.to(precision) for name, value in read_adapters(*source, averaged).items()}
    family.export_adapters(kept, folder, base=_base(run))


def _base(run: str) -> str:
    """Folder or hub id of the weights that a run's adapters belong to: those it began with."""
    model = read_run_config(run)["model"]
    start = model.get("init_from") or model["family"]["init_args"]["model"]
    if model.get("init_from") and find_checkpoint(start) is not None:
        logger.warning(
            "the adapters belong to the weights of %s, which is no Hugging Face folder; export it as well and load "
            "the adapters onto that", start
        )  # fmt: skip
    return start


def family_of(run: str, trusted: bool = False) -> CausalFamily | DiffusionFamily:
    """The model family of a run, from its saved config.

    Raises:
        ValueError: it names a class of others, which the user does not trust.
    """
    named = read_run_config(run)["model"]["family"]
    check_run_config({"model": {"family": named}}, Path(run) / "config.yaml", trusted)
    parser = ArgumentParser()
    parser.add_argument("--family", type=CausalFamily | DiffusionFamily)
    return parser.instantiate(parser.parse_object({"family": named})).family

"""`python -m longrl export`: a run's checkpoint as an ordinary Hugging Face folder."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)


def main(args: Sequence[str]) -> None:
    """Command line of `export_run`."""
    from jsonargparse import auto_cli

    auto_cli(export_run, args=list(args), as_positional=False, prog="python -m longrl export")


def export_run(
    run: str,
    out: str,
    checkpoint: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> None:
    """Writes weights, config, tokenizer and processor so that `from_pretrained` and vLLM load them.

    Args:
        run: folder of a training run, with its `config.yaml`.
        out: folder to write; it must not exist yet.
        checkpoint: which checkpoint; None is `checkpoints/last.ckpt`.
        dtype: precision to save in; None keeps the run's.
    """
    import torch

    from longrl.modules.weights import build_from

    if Path(out).exists():
        raise ValueError(f"--out={out} exists already; name a new folder")
    family = family_of(run)
    model = build_from(family, checkpoint or run)
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    with tempfile.TemporaryDirectory(dir=_parent(out)) as folder:
        written = Path(folder) / "export"
        model.save_pretrained(written)
        family.save_processing(written)
        os.replace(written, out)
    logger.info("exported %s to %s", run, out)


def family_of(run: str) -> object:
    """The model family of a run, from its saved config."""
    from jsonargparse import ArgumentParser

    from longrl.models.base import CausalFamily

    config = Path(run) / "config.yaml"
    if not config.is_file():
        raise ValueError(f"--run={run} has no config.yaml; name the folder of a training run (its --run_dir)")
    import yaml

    parser = ArgumentParser()
    parser.add_argument("--family", type=CausalFamily)
    values = yaml.safe_load(config.read_text())["model"]["family"]
    return parser.instantiate(parser.parse_object({"family": values})).family


def _parent(out: str) -> Path:
    parent = Path(out).resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    return parent

"""`python -m longrl diffusion COMMAND`: fit, validate and test of models that make pictures and videos.

The commands are those of language models; `model` configures a `DiffusionModule` and `data` files of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from longrl.commands.trainer import LongRLCLI
from longrl.diffusion.diffusion_module import DiffusionModule
from longrl.diffusion.prompt_files import PromptFiles
from longrl.diffusion.rollout_callback import DiffusionRolloutCallback


def main(args: Sequence[str]) -> None:
    """Runs the command that `args` begin with.

    Raises:
        ValueError: it is `predict`.
    """
    if args[:1] == ["predict"]:
        raise ValueError(
            "`predict` writes answers, and a diffusion model has none; use `test` or `validate` for its rewards, "
            "`validate` with longrl.diffusion.picture_grids.PictureGrids for samples in pictures/ of the run_dir"
        )
    DiffusionCLI.run(args)


class DiffusionCLI(LongRLCLI):
    """The command line of SD3 and Wan."""

    module_class = DiffusionModule
    data_class = PromptFiles
    rollout_class = DiffusionRolloutCallback
    kind = "diffusion"
    prog = "python -m longrl diffusion"

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {name: skip for name, skip in LongRLCLI.subcommands().items() if name != "predict"}

    @override
    def link_family(self, parser: LightningArgumentParser) -> None:
        """Prompts are text until the model's own encoders read them: there is nothing to link."""

    @override
    def before_fit(self) -> None:
        """`python -m longrl plan` knows no diffusion models, so there is nothing to warn of."""

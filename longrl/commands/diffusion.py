"""fit, validate and test of flow models: what configs with `policy: flow` run.

The commands are those of all policies; `model` configures a `DiffusionModule` and `data` files of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from longrl.commands.trainer import LongRLCLI
from longrl.diffusion.diffusion_module import DiffusionModule
from longrl.diffusion.prompt_files import PromptFiles
from longrl.diffusion.rollout_callback import DiffusionRolloutCallback


class FlowCLI(LongRLCLI):
    """The command line of SD3 and Wan."""

    policy = "flow"
    rollout_class = DiffusionRolloutCallback

    @classmethod
    @override
    def start(cls, args: Sequence[str]) -> LongRLCLI:
        if args[0] == "predict":
            raise ValueError(
                "`predict` writes answers, and a flow model has none; use `test` or `validate` for its rewards, "
                "`validate` with longrl.diffusion.picture_grids.PictureGrids for samples to look at, in pictures/ of the run_dir"
            )
        return super().start(args)

    @classmethod
    @override
    def classes(cls) -> tuple[type[LightningModule], type[LightningDataModule]]:
        return DiffusionModule, PromptFiles

    @override
    def link_family(self, parser: LightningArgumentParser) -> None:
        """Prompts are text until the model's own encoders read them: there is nothing to link."""

    @override
    def before_fit(self) -> None:
        """`python -m longrl plan` knows no flow models, so there is nothing to warn of."""

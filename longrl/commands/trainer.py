"""fit, validate, test and predict on LightningCLI: what longrl adds to its parser and its trainer."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from typing_extensions import override

from longrl.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from longrl.callbacks.random_state import RandomState
from longrl.callbacks.rollout import RolloutCallback
from longrl.callbacks.step_profile import StepProfile
from longrl.callbacks.terminal_view import TerminalView
from longrl.callbacks.watchdog import Watchdog
from longrl.commands import run_config
from longrl.commands.closing import end_of_fit, longrl, say_end
from longrl.commands.failures import keep_tracebacks_in
from longrl.commands.main import COMMAND_USAGE, TRAINER_COMMANDS
from longrl.commands.ranks import cluster_plugins, is_first_rank
from longrl.commands.renamed import MOVED
from longrl.commands.resuming import last_good_checkpoint
from longrl.commands.run_callbacks import View, check_rollouts, find_view, with_watch
from longrl.commands.run_config import Config, ModelKind
from longrl.commands.run_ending import advice, ending_of_run, resume_command
from longrl.commands.run_folders import (
    EVALUATING,
    check_checkpoints,
    check_tested_weights,
    checkpoint_folder,
    has_traces,
)
from longrl.commands.run_loggers import WandbMode, check_tensorboard, make_loggers, with_csv
from longrl.commands.run_parser import RunParser
from longrl.commands.run_settings import SHOWN_BY_DATA, read_settings, tell_differences, with_run_config
from longrl.commands.run_trust import CHECKPOINT_HELP, CHECKPOINT_OPTION, OPTION, TRUST_HELP
from longrl.commands.saved_config import SaveRunConfig
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.evaluation.samples import PREDICT_FOLDER, RESULTS_FILE, TEST_FOLDER
from longrl.evaluation.timings import write_command
from longrl.io.checkpoint_files import trust_checkpoints
from longrl.io.disk_space import check_writable
from longrl.io.folder_lock import FolderLock
from longrl.io.stop_signals import stop_signals
from longrl.modules.policy import PolicyModule
from longrl.rewards import RewardSum
from longrl.strategies.mr_sp import MRSPStrategy

if TYPE_CHECKING:
    from longrl.planning.run_plan import PlannedRun

logger = logging.getLogger(__name__)

Resume = Literal["auto"]

COMMAND_HELP = """{}: {}. The options of a class are listed by --model.family.help CLASS, --trainer.callbacks.help CLASS
and so on, for instance --rollout.engine.help longrl.engines.vllm.VLLMEngine."""


class LongRLCLI(LightningCLI):
    """`run_dir` decides where a run leaves everything: config, checkpoints, logs, samples."""

    module_class: ClassVar[type[LightningModule]] = PolicyModule
    data_class: ClassVar[type[LightningDataModule]] = LongVideoReason
    rollout_class: ClassVar[type[Callback]] = RolloutCallback
    """The classes that `model`, `data` and `rollout` configure."""
    kind: ClassVar[ModelKind] = "language"
    prog: ClassVar[str] = "python -m longrl"
    lock: FolderLock | None = None
    """Keeps other runs out of the folder of this one."""
    given: Sequence[str] = ()
    """The command line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.given = list(kwargs.get("args") or [])
        with stop_signals() as signals:
            try:
                super().__init__(*args, **kwargs)  # Lightning runs the command here
            finally:
                if self.lock is not None:
                    self.lock.release()
                if signals is not None:
                    signals.interrupt()

    @classmethod
    def run(cls, args: Sequence[str]) -> LongRLCLI:
        """Parses `args`, the command first, and runs it."""
        # peft imports it where it is installed, and on a CPU it misses kernels in 4 bits, which nothing here uses.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        usage = COMMAND_USAGE.format(cls.prog, "{" + ",".join(cls.subcommands()) + "}")
        texts = {name: command_texts(cls.prog, name) for name in cls.subcommands()}
        return cls(
            cls.module_class,
            cls.data_class,
            save_config_callback=SaveRunConfig,
            parser_class=RunParser,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"prog": cls.prog, "usage": usage, **texts},
            args=with_run_config(args) if args else [],
        )

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """The parser of a command; one without options if another is given, for to add those of all takes a second."""
        command = next(iter(self.given), None)
        if command == subcommand or command not in self.subcommands():
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        run_config.set_config_reader(self.current_config)
        try:
            super().parse_arguments(parser, args)
        finally:  # other parsers of this process read other configs
            run_config.set_config_reader()

    @override
    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would read all of a checkpoint here for options that ours do not have."""

    @override
    def _dump_config(self) -> None:
        """Nothing: Lightning would print all of the config for hyperparameters, which our modules do not save."""
        self.config_dump: dict[str, Any] = {}

    def current_config(self, values: Config, path: Path) -> Config:
        """A config file's values in today's form."""
        return run_config.training_config(values, path, self.kind)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        where = "folder that gets everything: config, checkpoints, logs, samples; another one for each run"
        parser.add_argument("--run_dir", type=str, default="runs/default", help=where)
        parser.add_argument(
            "--resume",
            type=Resume | None,
            default=None,
            help="`auto` goes on from the last good checkpoint in run_dir, or begins where there is none; of `fit` "
            "alone",
        )
        parser.add_argument(
            "--base_weights",
            type=bool,
            default=False,
            help="evaluate the family's own weights on purpose, into a run_dir of their own; not of `fit`",
        )
        parser.add_argument(OPTION, type=bool, default=False, help=f"{TRUST_HELP}; not of `fit`")
        parser.add_argument(CHECKPOINT_OPTION, type=bool, default=False, help=CHECKPOINT_HELP)
        parser.add_argument("--wandb", type=WandbMode, default="off", help="log to Weights & Biases beside CSV")
        parser.add_argument("--wandb_project", type=str, default="longrl", help="project that --wandb logs to")
        parser.add_argument("--tensorboard", type=bool, default=False, help="log to run_dir/tensorboard beside CSV")
        parser.add_argument(
            "--view",
            type=View,
            default="auto",
            help="progress as a screen (live), as a line for each logged step (plain), or not at all (off); auto is "
            "live on a terminal",
        )
        parser.add_argument(
            "--profile",
            type=str | None,
            default=None,
            metavar="DIR",
            help="write the trace, the slowest operators and the GPU's memory of one step to this folder; of `fit` "
            "alone",
        )
        # Without a reward there is no rollout callback, as for SFT that does not generate: hence no required option.
        parser.add_class_arguments(self.rollout_class, "rollout", skip={"reward"}, instantiate=False, sub_configs=True)
        parser.add_argument(
            "--rollout.reward",
            type=RewardSum | None,
            default=None,
            sub_configs=True,
            help="what scores completions; RL needs one",
        )
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.save_top_k": 0})
        # Without a counter `last.ckpt` is always the last one, also in a run that was moved or started anew.
        parser.set_defaults({"checkpoint.every_n_train_steps": 50, "checkpoint.enable_version_counter": False})
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=checkpoint_folder)
        self.link_family(parser)

    def link_family(self, parser: LightningArgumentParser) -> None:
        """The data module renders prompts as the model reads them."""
        parser.link_arguments("model.family", "data.family", apply_on="instantiate")

    @override
    def before_instantiate_classes(self) -> None:
        trust_checkpoints(self._get(self.config, "trust_checkpoint"))
        run_dir = self._get(self.config, "run_dir")
        keep_tracebacks_in(run_dir)
        is_there = Path(run_dir).exists()
        if is_there:
            self.lock_run(run_dir)
        self.find_checkpoint(run_dir)
        self.check_weights()
        if not is_there:  # made only if nothing speaks against the run
            self.lock_run(run_dir)
        trainer = self._get(self.config, "trainer")
        check_tensorboard(trainer.get("logger"))
        if any(map(run_config.is_rollout_callback, run_config.callback_list(trainer))):
            raise ValueError(MOVED)
        by_batch = "data.prompts_per_batch and model.max_tokens_per_micro_batch"
        remedies = {"gradient_clip_val": (0, "model.max_grad_norm"), "accumulate_grad_batches": (1, by_batch)}
        for name, (neutral, instead) in remedies.items():
            if trainer.get(name) not in (None, neutral):
                raise ValueError(
                    f"trainer.{name}={trainer.get(name)} has no effect, for longrl optimizes manually; "
                    f"set {instead} instead"
                )

    def lock_run(self, run_dir: str) -> None:
        """Has no other process train into `run_dir`; evaluations may read there."""
        if self.subcommand == "fit":
            check_writable(run_dir)
            if self._get(self.config, "profile") is not None:
                check_writable(self._get(self.config, "profile"), "--profile")
        if self.subcommand == "fit" and is_first_rank():
            self.lock = FolderLock(run_dir, "--run_dir")

    def find_checkpoint(self, run_dir: str) -> None:
        """`--resume auto`: names the checkpoint to go on from, if there is one."""
        if self._get(self.config, "resume") is None or self.subcommand is None:
            return
        if self.subcommand != "fit":
            raise ValueError(f"--resume=auto is of `fit`; name what `{self.subcommand}` reads by --ckpt_path")
        found = last_good_checkpoint(run_dir, reads=is_first_rank())
        if found is not None:
            logger.info("the run goes on from %s", found)
            self.config[self.subcommand]["ckpt_path"] = str(found)

    def check_weights(self) -> None:
        """Raises ValueError if a run would be replaced, or evaluated with weights that are not its own."""
        run_dir, ckpt_path = (self._get(self.config, name) for name in ("run_dir", "ckpt_path"))
        base_weights = self._get(self.config, "base_weights")
        config = self.config.get(str(self.subcommand), self.config)
        is_compared = self.subcommand == "fit" and has_traces(run_dir)
        dumped = self._parser(self.subcommand).dump(config, skip_none=False) if is_compared else ""
        check_checkpoints(self.subcommand, run_dir, ckpt_path, dumped, self._get(self.config, "resume") is not None)
        if self.subcommand in EVALUATING:
            init_from = self._get(self.config, "model").get("init_from")
            check_tested_weights(self.subcommand, run_dir, ckpt_path, init_from, base_weights)
            self.tell_departures(ckpt_path or init_from)
        elif base_weights:
            raise ValueError(
                "--base_weights=true is of validate, test and predict; `fit` begins with the family's own weights "
                "where model.init_from is not set: leave it out"
            )

    def tell_departures(self, weights: str | None) -> None:
        """Says where an evaluation does not ask as the run whose weights it reads."""
        settings = read_settings(weights) if self.kind == "language" else None
        if settings is not None:
            config = self.config[str(self.subcommand)].as_dict()
            data = {name: config["data"][name] for name in SHOWN_BY_DATA}
            tell_differences(settings, {"family": config["model"]["family"], "data": data})

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        check_accelerator(self._get(self.config_init, "trainer.accelerator"))
        strategy = self._get(self.config_init, "trainer.strategy")
        if isinstance(strategy, str) and "." in strategy:  # a class path without options is a string to jsonargparse
            module, _, name = strategy.rpartition(".")
            kwargs.setdefault("strategy", getattr(importlib.import_module(module), name)())
        given = self._get(self.config_init, "trainer.logger", True)
        if given in (None, True):
            kwargs.setdefault("logger", self._loggers())
        elif given:
            kwargs.setdefault("logger", with_csv(given, self._get(self.config_init, "run_dir"), self.subcommand))
        plugins = self._get(self.config_init, "trainer.plugins") or []
        kwargs.setdefault("plugins", [*plugins, *cluster_plugins(plugins), AtomicCheckpointIO()])
        listed = run_config.callback_list(self._get(self.config_init, "trainer"))
        rollout = self.rollout_callback()
        is_rl = self.subcommand == "fit" and self._get(self.config, "data").get("stage", "rl") == "rl"
        options = vars(self._get(self.config, "rollout"))
        check_rollouts(listed, rollout, self.rollout_class, needs_one=is_rl, given=options)
        # The rollout callback comes last, as it stood in the list once: at a batch's end those before it read what the
        # step before logged, so that what they log and save stays the same.
        callbacks = [*listed, rollout] if rollout else listed
        callbacks = self.with_onlookers(callbacks)
        profile = self._get(self.config_init, "profile")
        if profile is not None and self.subcommand == "fit":
            callbacks = [StepProfile(profile), *callbacks]
        kwargs.setdefault("callbacks", callbacks)
        if not any(isinstance(one, BaseProgressBar) for one in callbacks):
            kwargs.setdefault("enable_progress_bar", False)  # Lightning would add a bar of its own
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(RandomState())  # type: ignore[attr-defined]  # Lightning does not declare it
        return trainer

    def with_onlookers(self, callbacks: Sequence[Callback]) -> list[Callback]:
        """The callbacks of a run with those that look on, which come behind all that logs."""
        is_off = self._get(self.config_init, "trainer.enable_progress_bar") is False
        views = [] if is_off else find_view(callbacks, self._get(self.config_init, "view"))
        return [*(with_watch(callbacks) if self.subcommand == "fit" else callbacks), *views]

    def rollout_callback(self) -> Callback | None:
        """The callback that the group `rollout` describes; None without a reward."""
        options = self._get(self.config_init, "rollout")
        return None if options["reward"] is None else self.rollout_class(**options)

    def fit(self, model: LightningModule, **options: Any) -> None:
        """`Trainer.fit`, whose end is that of all ranks of the run: Lightning calls it in its place."""
        command = resume_command(self.prog, self.given)
        how_to_go_on = functools.partial(advice, command, self._get(self.config, "run_dir"))
        if self.trainer.world_size > 1:
            logger.info("%d processes meet: the first waits for all of them", self.trainer.world_size)
        with ending_of_run(self.trainer, how_to_go_on):
            self.trainer.fit(model, **options)

    def after_fit(self) -> None:
        """Says what there is now, and what it is for; Lightning calls it."""
        if self.trainer.is_global_zero:
            data = self._get(self.config, "data").as_dict()
            configs = [str(path) for path in self._get(self.config, "config") or ()]
            run_dir, step = self._get(self.config, "run_dir"), self.trainer.global_step
            end_of_fit(run_dir, step, data, self.prog.split()[3:], configs)

    def test(self, model: LightningModule, **options: Any) -> None:
        """`Trainer.test`, whose metrics the view shows in one line; Lightning calls it in its place."""
        self.trainer.test(model, **self.without_table(options))

    def validate(self, model: LightningModule, **options: Any) -> None:
        """`Trainer.validate`, as `test`."""
        self.trainer.validate(model, **self.without_table(options))

    def without_table(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options of an evaluation without Lightning's own table where the view says the same."""
        has_view = any(isinstance(one, TerminalView) for one in self.trainer.callbacks)  # type: ignore[attr-defined]
        return options | {"verbose": False} if has_view else options

    def after_test(self) -> None:
        """Leaves the command beside what it found; Lightning calls it."""
        folder = Path(self._get(self.config_init, "run_dir")) / TEST_FOLDER
        if is_first_rank() and (folder / RESULTS_FILE).is_file():
            write_command(folder, self.given, self.prog)
            report = folder / "report.html"
            say_end(
                [f"results: {folder / RESULTS_FILE}; report: {report}"], [longrl("compare", "OTHER_RUN", folder.parent)]
            )

    def after_predict(self) -> None:
        """Says where the answers are; Lightning calls it."""
        if is_first_rank():
            say_end([f"answers: {Path(self._get(self.config_init, 'run_dir')) / PREDICT_FOLDER}"])

    def before_fit(self) -> None:
        """Says before weights are loaded that the longest videos will not fit the GPUs, and what would help.

        A warning, no error: the videos of a run may all be shorter than the config allows.
        """
        device = self.trainer.strategy.root_device
        if isinstance(self.trainer.strategy, MRSPStrategy) and device.type == "cuda" and self.trainer.is_global_zero:
            from longrl.planning.run_plan import verdict_before_start

            available = torch.cuda.get_device_properties(device).total_memory
            verdict = verdict_before_start(self.planned_run(), self.trainer.num_devices, available)
            if not verdict.fits:
                logger.warning("at the longest videos and prompts of its config this run %s", verdict.text)

    def planned_run(self) -> PlannedRun:
        """The parts of this run that `longrl.planning` reads."""
        from longrl.planning.run_plan import PlannedRun

        trainer = self._get(self.config_init, "trainer")
        strategy, precision, num_nodes = (trainer[name] for name in ("strategy", "precision", "num_nodes"))
        num_devices = device_count(trainer["devices"])
        rollout = self.rollout_callback()
        return PlannedRun(self.model, self.datamodule, strategy, str(precision), num_nodes or 1, num_devices, rollout)

    def _loggers(self) -> list[Logger]:
        options = [self._get(self.config_init, name) for name in ("wandb", "wandb_project", "tensorboard")]
        return make_loggers(self._get(self.config_init, "run_dir"), self.subcommand, *options)


def device_count(devices: list[int] | int | str) -> int | None:
    """How many devices `trainer.devices` names, by number or as a list, also as text; None if the machine decides."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdecimal() and int(text) else None


def check_accelerator(name: str | None) -> None:
    """Raises ValueError, before anything is built, if a recipe wants a GPU and there is none."""
    if name in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise ValueError(
            f"trainer.accelerator={name}, but torch sees no GPU here; append --trainer configs/trainer/cpu.yaml for a "
            "CPU, and --rollout.engine configs/rollout/hf.yaml where a recipe generates by vLLM; or look at the driver "
            "by nvidia-smi"
        )


def command_texts(prog: str, command: str) -> dict[str, str]:
    """Usage and description of a command: an error begins with one line instead of a page of all options."""
    description = COMMAND_HELP.format(command, TRAINER_COMMANDS[command].partition(":")[0])
    return {"usage": COMMAND_USAGE.format(prog, command), "description": description}

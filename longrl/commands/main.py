"""The command line. Heavy imports wait until a command needs them, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

from longrl.commands.aliases import nearest_command, without_aliases
from longrl.commands.console import quiet_bars, quiet_libraries, speak
from longrl.commands.failures import keep_tracebacks_in, tell_error
from longrl.commands.renamed import current_arguments
from longrl.commands.shipped_paths import with_shipped_files
from longrl.commands.show_help import asks_for_class, asks_for_help, help_page, page_name, show
from longrl.io.functions import search_working_folder
from longrl.io.processes import end_with_parent
from longrl.io.stop_signals import StopRun, ignore_signals, interruptible

logger = logging.getLogger(__name__)

TRAINER_COMMANDS = {
    "fit": "train by SFT, by pairs of answers or by RL",
    "validate": "evaluate on the validation rows",
    "test": "evaluate on the test rows, with a table and a results file",
    "predict": "generate for the prediction rows",
}
OTHER_COMMANDS = {
    "diffusion": ("longrl.commands.diffusion", "fit, validate and test of models that make pictures and videos"),
    "export": ("longrl.commands.export", "write a Hugging Face folder from a run's checkpoint"),
    "cache-features": (
        "longrl.commands.cache_features",
        "encode all media of a run once, for this run and others to read",
    ),
    "plan": ("longrl.commands.plan", "memory and time of a run on given hardware, without its weights"),
    "serve": ("longrl.commands.serve", "a vLLM server for the rollouts of a run, on devices of its own"),
    "pipeline": ("longrl.commands.pipeline", "make a data set of questions with reasoning from videos, step by step"),
    "evaluate": ("longrl.commands.evaluate", "a policy on a benchmark, here or behind an endpoint, with a report"),
    "own-answers": ("longrl.commands.own_answers", "a run's own best answers as SFT records, or as pairs for DPO"),
    "compare": ("longrl.commands.compare", "what one evaluation gains over another, question by question"),
    "scoreboard": (
        "longrl.commands.scoreboard",
        "accuracy of evaluations against cost, beside published figures",
    ),
    "report": ("longrl.commands.report", "curves, alerts and samples of training runs, side by side, as HTML"),
    "replay": ("longrl.commands.replay", "where the first number of a step that was left out is not finite"),
    "recipes": ("longrl.commands.recipes", "configs, launch scripts and prompts that ship: list, show, copy"),
    "init": ("longrl.commands.init", "write a folder to start from: configs, records, a reward, the next commands"),
    "doctor": ("longrl.commands.doctor", "what this installation and machine can do, and what adds what is missing"),
    "demo": ("longrl.commands.demo", "the whole path on one laptop: data, SFT, RL, evaluation, report"),
    "synthetic": ("longrl.commands.synthetic", "generate long videos with known stories"),
}
KEPT = {
    "evaluate": "what was answered is kept: the same command goes on",
    "pipeline": "what was answered is kept: the same command goes on",
    "cache-features": "features written so far are kept: the same command goes on",
    "demo": "stages that ended are kept: the same command goes on",
    "test": "nothing is kept of it: the same command asks again",
    "predict": "nothing is kept of it: the same command asks again",
}
"""What there is of a command that a signal interrupts, and how to go on."""
SLOW_IMPORTS = frozenset((*TRAINER_COMMANDS, "evaluate", "export", "cache-features", "plan", "serve", "diffusion"))
"""Commands that take seconds until they can say what is wrong with their options."""
WITH_OWN_SIGNALS = ("serve",)
"""Commands whose server handles signals itself."""
COMMAND_USAGE = "{} {} --config FILE.yaml [--config FILE.yaml ...] [--KEY VALUE ...]"
"""Usage of one command that takes configs: an error begins with this line instead of a page of all options."""
USAGE = """usage: python -m longrl COMMAND [--config FILE.yaml ...] [--KEY VALUE ...]

Reinforcement learning for vision-language models that reason over long videos.

example:
  python -m longrl synthetic --out runs/demo/data --num_train_videos 50 --num_eval_videos 10 --fps 2
  python -m longrl fit --config configs/demo/common.yaml --config configs/demo/sft.yaml --run_dir runs/first

commands:
{commands}

`python -m longrl COMMAND --help` lists every option of a command, `--OPTION.help CLASS` what a class takes.
Several --config compose: later ones win, key by key, and options of the command line win over files.
Chain two stages by --model.init_from RUN; go on with an interrupted run by the same command and --resume auto.
An unexpected error leaves RUN/traceback.txt; with LONGRL_TRACEBACK=1 every error prints its traceback.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: the command and its options; an error is raised. None takes them from the command line, where an error
            ends the process with one line: status 2 is a user's mistake, 1 anything else, with its traceback in a file.
    """
    search_working_folder()  # for functions and classes that a config names
    if args is not None:
        run_command(list(args))
        return
    end_with_parent()
    keep_tracebacks_in(None)
    speak()
    try:
        run_command(sys.argv[1:])
    except StopRun:
        ignore_signals()  # srun ends the other ranks of a step as soon as one has ended with another code than 0
        raise
    except Exception as error:
        sys.exit(tell_error(error))


def run_command(args: list[str]) -> None:
    """Runs the command that `args` begins with."""
    args = with_shipped_files(current_arguments(without_aliases(args)))
    command = args[0] if args else "--help"
    if command in WITH_OWN_SIGNALS:
        dispatch(command, args)
        return
    with interruptible(command, KEPT.get(command, "")):
        dispatch(command, args)


def dispatch(command: str, args: list[str]) -> None:
    """Calls a command, `args` with its name first; for `--help` it prints the page of the command."""
    if command in ("-h", "--help"):
        sys.stdout.write(usage())
        return
    if asks_for_help(args):
        page = help_page(page_name(args))
        if page is not None:
            show(page)
            return
    quiet_libraries()
    if command in SLOW_IMPORTS and "torch" not in sys.modules and not asks_for_class(args):
        logger.info("importing torch, lightning and transformers")
        quiet_bars(command)
    if asks_for_class(args):
        from longrl.commands.help_text import import_classes
        from longrl.commands.parsers import described_fields

        import_classes()
        with described_fields():
            call(command, args)
        return
    call(command, args)


def call(command: str, args: list[str]) -> None:
    """Calls a command that is to do something, `args` with its name first.

    Raises:
        ValueError: there is no such command.
    """
    if command in TRAINER_COMMANDS:
        from longrl.commands.trainer import LongRLCLI

        LongRLCLI.run(args)
    elif command in OTHER_COMMANDS:
        importlib.import_module(OTHER_COMMANDS[command][0]).main(args[1:])
    else:
        commands = [*TRAINER_COMMANDS, *OTHER_COMMANDS]
        nearest = nearest_command(command, commands)
        meant = f"did you mean {nearest}? The others are" if nearest else "choose one of"
        others = ", ".join(name for name in commands if name != nearest)
        raise ValueError(f"unknown command {command!r}; {meant} {others}")


def usage() -> str:
    """Text of `python -m longrl --help`."""
    texts = TRAINER_COMMANDS | {name: text for name, (_, text) in OTHER_COMMANDS.items()}
    return USAGE.format(commands="\n".join(f"  {name:<14} {text}" for name, text in texts.items()))

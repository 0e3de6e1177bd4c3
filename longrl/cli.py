"""The command line. Heavy imports wait until a command needs them, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

TRAINER_COMMANDS = {
    "fit": "train by SFT or RL: python -m longrl fit --config configs/demo/sft.yaml",
    "validate": "evaluate on the validation rows",
    "test": "evaluate on the test rows, with a table and a results file",
    "predict": "generate for the prediction rows",
}
OTHER_COMMANDS = {
    "export": ("longrl.export", "write a Hugging Face folder from a run's checkpoint"),
    "demo": ("longrl.demo", "the whole path on one laptop: data, SFT, RL, evaluation, report"),
    "synthetic": ("longrl.datamodules.synthetic", "generate long videos with known stories"),
}

USAGE = """usage: python -m longrl COMMAND [--config FILE.yaml ...] [--KEY VALUE ...]

Reinforcement learning for vision-language models that reason over long videos.

{commands}

`python -m longrl COMMAND --help` lists every option of a command. Several --config compose: later ones win.
Chain two stages by --model.init_from RUN; go on with an interrupted run by --ckpt_path RUN/checkpoints/last.ckpt.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command; `args` defaults to the command line."""
    args = list(sys.argv[1:] if args is None else args)
    command = args[0] if args else "--help"
    if command in ("-h", "--help"):
        sys.stdout.write(usage())
    elif command in TRAINER_COMMANDS:
        from longrl.trainer_cli import LongRLCLI

        LongRLCLI.run(args)
    elif command in OTHER_COMMANDS:
        importlib.import_module(OTHER_COMMANDS[command][0]).main(args[1:])
    else:
        commands = ", ".join([*TRAINER_COMMANDS, *OTHER_COMMANDS])
        sys.exit(f"longrl: unknown command {command!r}; choose one of {commands}")


def usage() -> str:
    """What `python -m longrl --help` prints."""
    texts = TRAINER_COMMANDS | {name: text for name, (_, text) in OTHER_COMMANDS.items()}
    return USAGE.format(commands="\n".join(f"  {name:<10} {text}" for name, text in texts.items()))

"""VLMEvalKit's `run.py` with one more model: `python -m longrl.harness.vlmevalkit_run [NAME=VALUE..] RUN.PY ARGUMENTS`.

VLMEvalKit finds models in a dict and in a module of its own and has no plugins. This puts longrl's there, as
`--model longrl` with the options given, and as the class `LongRL` for its `--config`, and then runs its script.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

USAGE = "python -m longrl.harness.vlmevalkit_run [NAME=VALUE..] VLMEvalKit/run.py --model longrl --data NAME .."


def split_arguments(args: Sequence[str]) -> tuple[dict[str, Any], str, list[str]]:
    """Options of the model, the script, and its arguments.

    Raises:
        ValueError: there is no script, or something before it that is no option.
    """
    place = next((at for at, arg in enumerate(args) if "=" not in arg), None)
    if place is None or not Path(args[place]).is_file():
        found = "nothing" if place is None else args[place]
        raise ValueError(f"behind the model's options stands the path of VLMEvalKit's run.py, got {found!r}; {USAGE}")
    pairs = (arg.split("=", 1) for arg in args[:place])
    return {name: yaml.safe_load(value) for name, value in pairs}, args[place], list(args[place + 1 :])


def main(args: Sequence[str]) -> None:
    """Runs VLMEvalKit's script, whose folder it imports from, as if it had been called itself."""
    options, script, rest = split_arguments(args)
    sys.path.insert(0, str(Path(script).resolve().parent))
    import vlmeval.vlm
    from vlmeval.config import supported_VLM

    from longrl.harness.vlmevalkit_model import LongRL

    supported_VLM["longrl"] = partial(LongRL, **options)
    vlmeval.vlm.LongRL = LongRL
    sys.argv = [script, *rest]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])

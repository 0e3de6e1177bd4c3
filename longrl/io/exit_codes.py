"""Exit codes of `python -m longrl` by which a scheduler tells what to do: 0 is a run that ended, 1 an error."""

from __future__ import annotations

MISTAKE = 2
"""The command line, a config or a file that the user gave is wrong: a line says what; another start changes nothing."""
HUNG = 70
"""A phase, rank, worker or server went past its limit, and the watchdog ended the run; or no rollout server was left,
and the run saved a checkpoint. `--resume auto` goes on."""
STOPPED = 75
"""A signal asked the run to end; it saved a checkpoint first. Requeue it: `--resume auto` goes on (EX_TEMPFAIL)."""
INTERRUPTED = 130
"""A second Ctrl-C ended the run at once, without a checkpoint of the step it was in."""

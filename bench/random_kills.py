"""Tiny runs that signals end at random moments, continued by `--resume auto` until they are done: what differs then?

    python bench/random_kills.py --json bench/results/random_kills.json [--kills 100]

SFT on text, RL with groups that wait for a later step, and SFT by two ranks whose checkpoints are sharded. Each part of
a run is a fork of this process, which spares the imports, and runs the real command line. At a random moment, in the
set-up or in training, it is sent SIGKILL, SIGTERM, SIGINT, SIGHUP or SIGUSR1, or two of them; of two ranks one of them
or both are. A part that has ended with 0 by then has ended its run, which is compared with an undisturbed one: final
weights, and every metric of every step but timings, to the last bit.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch: one thread suits the tiny models
    os.environ.setdefault(variable, "1")

import torch  # noqa: E402
from common import ROOT, console, parse_arguments, report  # noqa: E402

sys.path.append(str(ROOT))

from longrl.io.exit_codes import INTERRUPTED, STOPPED  # noqa: E402
from longrl.models.text import TextFamily  # noqa: E402
from longrl.modules.initial_weights import build_from  # noqa: E402
from tests.runs import metrics, run, start_in_child, text_config, wait_for_session  # noqa: E402

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
DOCUMENTED = {STOPPED, INTERRUPTED, *(-number for number in SIGNALS), *(128 + number for number in SIGNALS)}
"""Exit codes of a part that a signal ended (docs/signals_and_exits.md)."""
OF_OTHER_RANK = {1}
"""Of a rank whose other one was killed."""
TOGETHER_S = 8.0
"""How long a rank may outlive the other one before it is killed, as torchrun does."""
PART_S = 90.0
"""A part that takes longer hangs, which no signal may lead to."""
STEPS = 8
KINDS = ("sft", "rl", "sft", "two ranks")
QUICK_KILLS = 2


# ---- runs ----


def make_config(kind: str, rows: Path) -> dict[str, Any]:
    """A run of 8 steps in 2 epochs with validation, saved every 2 steps."""
    values = text_config(rows, "rl" if kind == "rl" else "sft")
    values["trainer"] |= {"max_epochs": 2, "val_check_interval": 2}
    values["data"]["val"] = str(rows)
    values["checkpoint"] = {"every_n_train_steps": 2}
    if kind == "rl":
        values["model"]["algorithm"] = {"select": "longrl.algorithms.drop_uniform", "kl_coef": 0.1}
        values["rollout"]["max_resample_rounds"] = 3
    if kind == "two ranks":
        listed = values["trainer"]["callbacks"]
        values["trainer"]["callbacks"] = [one for one in listed if "DataOrder" not in one["class_path"]]
        options = {"sequence_parallel_size": 1, "timeout_s": 600.0}
        strategy = {"class_path": "longrl.strategies.mr_sp.MRSPStrategy", "init_args": options}
        values["trainer"] |= {"devices": 2, "strategy": strategy}
        values["data"]["prompts_per_batch"] = 1
    return values


def write_rows(path: Path) -> Path:
    rows = [f'{{"id": "q{n}", "problem": "What is {n} and {n}?", "answer": "{2 * n}"}}\n' for n in range(STEPS)]
    path.write_text("".join(rows))
    return path


def start_part(kind: str, folder: Path, values: dict[str, Any]) -> list[int]:
    """The processes of a part of a run, one for each rank."""
    with silent(folder):
        if kind != "two ranks":
            return [start_in_child(folder, values, "--resume=auto")]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(2):
            of_torchrun = {
                "TORCHELASTIC_RUN_ID": "kills", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2,
                "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0,
            }  # fmt: skip
            before = dict(os.environ)
            os.environ |= {name: str(value) for name, value in of_torchrun.items()}
            processes.append(start_in_child(folder, values, "--resume=auto"))
            os.environ.clear()
            os.environ |= before
        return processes


@contextlib.contextmanager
def silent(folder: Path) -> Any:
    """What the parts of a run print goes to a file beside it, for whoever looks for a cause."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)


def end_part(processes: Sequence[int]) -> list[int]:
    """Exit codes, minus the number of a signal; a rank that waits for one that has ended is killed in the end."""
    codes: dict[int, int] = {}
    deadline = None
    latest = time.monotonic() + PART_S
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    codes[process] = os.waitstatus_to_exitcode(status)
                    deadline = deadline or time.monotonic() + TOGETHER_S
        if deadline is not None and time.monotonic() > deadline:
            for process in set(processes) - codes.keys():
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > latest:
            raise RuntimeError(f"processes {set(processes) - codes.keys()} of a part did not end within {PART_S:g} s")
        time.sleep(0.01)
    for process in processes:
        wait_for_session(process)
    return [codes[process] for process in processes]


# ---- kills ----


def disturb(processes: Sequence[int], chance: random.Random, longest_s: float) -> str | None:
    """Waits for a random moment and sends what it draws; None if the part had ended before."""
    time.sleep(chance.choice([chance.uniform(0.0, 0.5), *[chance.uniform(0.5, 1.1)] * 3]) * longest_s)
    drawn = chance.sample(SIGNALS, 1 if chance.random() < 0.8 else 2)
    ranks = processes if chance.random() < 0.5 else [chance.choice(list(processes))]
    if any(os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) for process in processes):
        return None
    for number in drawn:
        for process in ranks:
            os.kill(process, number)
    names = "+".join(number.name for number in drawn)
    return names if len(processes) == 1 else f"{names} to {len(ranks)} of {len(processes)} ranks"


def killed_run(
    kind: str, folder: Path, values: dict[str, Any], chance: random.Random, longest_s: float, max_kills: int
) -> tuple[list[str], list[list[int]]]:
    """Kills and continues a run until it is done; what was sent, and the exit codes of each part that it ended."""
    sent, codes = [], []
    while True:
        processes = start_part(kind, folder, values)
        names = disturb(processes, chance, longest_s) if len(sent) < max_kills else None
        ended = end_part(processes)
        if not any(ended):
            return sent, codes
        if names is None:
            raise RuntimeError(f"a part that nobody disturbed ended with {ended}; see {folder}.log")
        sent.append(names)
        codes.append(ended)


def same_end(folder: Path, reference: Path, values: dict[str, Any]) -> bool:
    """Final weights and all metrics, bit for bit."""
    if metrics(folder) != metrics(reference):
        return False
    family = TextFamily(**values["model"]["family"]["init_args"])
    ours, theirs = (build_from(copy.deepcopy(family), str(run)).state_dict() for run in (folder, reference))
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def is_documented(codes: Sequence[int]) -> bool:
    """True of a part whose ranks all ended with a code that a scheduler can tell from success."""
    first = any(code in DOCUMENTED for code in codes)
    return first and all(code in DOCUMENTED | OF_OTHER_RANK for code in codes)


def undisturbed_run(kind: str, folder: Path, values: dict[str, Any]) -> tuple[Path, float]:
    """A run that nobody disturbs, and the seconds that one takes once everything is loaded."""
    if kind != "two ranks":
        with silent(folder / "warm"):
            run(folder / "warm" / kind, values)  # here, so that forks have what it loads
    started = time.monotonic()
    undisturbed = folder / f"undisturbed {kind}"
    codes = end_part(start_part(kind, undisturbed, values))
    if any(codes):
        said = Path(f"{undisturbed}.log").read_text()[-2000:]
        raise RuntimeError(f"the undisturbed run ended with {codes}; it said:\n{said}")
    return undisturbed, time.monotonic() - started


def kill_runs(num_kills: int, folder: Path, seed: int) -> list[dict[str, Any]]:
    """A row for each run, until so many parts have been ended."""
    chance = random.Random(seed)
    rows_file = write_rows(folder / "rows.jsonl")
    references: dict[str, tuple[Path, float]] = {}
    table: list[dict[str, Any]] = []
    total = 0
    while total < num_kills:
        number = len(table)
        kind = KINDS[number % len(KINDS)]
        values = make_config(kind, rows_file)
        if kind not in references:
            references[kind] = undisturbed_run(kind, folder, values)
        reference, longest_s = references[kind]
        killed = folder / f"run{number}"
        sent, parts = killed_run(kind, killed, values, chance, longest_s, num_kills - total)
        total += len(sent)
        exits = collections.Counter("/".join(map(str, codes)) for codes in parts)
        table.append({
            "kind": kind,
            "kills": len(sent),
            "sent": ", ".join(f"{count} {name}" for name, count in collections.Counter(sent).most_common()),
            "exit_codes": ", ".join(f"{count} x {code}" for code, count in exits.most_common()),
            "all_documented": all(map(is_documented, parts)),
            "same_end": same_end(killed, reference, values),
        })  # fmt: skip
        console.print(f"{total} kills: {table[-1]}", soft_wrap=True, highlight=False)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exits with 1 if a run differs or an exit code is none of those documented."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--kills", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    own, others = parser.parse_known_args(argv)
    arguments = parse_arguments(__doc__ or "", others)
    num_kills = own.kills or (QUICK_KILLS if arguments.quick else 100)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="longrl-kills-", ignore_cleanup_errors=True) as folder:
        table = kill_runs(num_kills, Path(folder), own.seed)
    bad = [row for row in table if not (row["same_end"] and row["all_documented"])]
    notes = [f"{sum(row['kills'] for row in table)} kills in {len(table)} runs; {len(bad)} runs not as they should be"]
    report(__file__, arguments, table, notes)
    if bad:
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Rollout servers that are killed at random moments during a run: does it come to its end, and what was repeated?

    python bench/engine_kills.py --json bench/results/engine_kills.json [--kills 30]

A tiny run of the real command line samples by three servers with a stand-in engine (longrl/testing/engine_server.py),
whose completions take long-tailed times. One of them, or now and then all, gets SIGKILL at a random moment and is
started again a random while later, with random weights. `lost` counts prompts that were read and that no step was
trained on, but for those that are under way at the end, or that `rollout.max_staleness` dropped, as it does without
kills, because their completions took more steps than it allows (`dropped`). Without staleness the run is
compared with an undisturbed one: all metrics of all steps but timings, to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch: one thread suits the tiny models
    os.environ.setdefault(variable, "1")

import yaml  # noqa: E402
from common import ROOT, console, parse_arguments, report  # noqa: E402
from random_kills import silent  # noqa: E402

sys.path.append(str(ROOT))

from longrl.testing.engine_servers import EngineServers  # noqa: E402
from tests.runs import data_order, metrics, rollouts, run, start_in_child, text_config  # noqa: E402

NUM_SERVERS = 3
PROMPTS = 4
KILLS, QUICK_KILLS = 30, 3
STEPS_PER_KILL = 2
ALL_AT_ONCE = 0.15
"""Share of kills that hit every server."""
PACE = {"seconds_per_token": 0.01, "tail": 1.0}
COUNTS = ("rollout/repeated", "rollout/servers_lost")


def make_config(folder: Path, max_staleness: int, steps: int, urls: Sequence[str]) -> dict[str, Any]:
    """A run on text, every step of 4 prompts with 2 completions of up to 16 tokens."""
    values = text_config(folder / "rows.jsonl", "rl")
    options = {"urls": list(urls), "weights_folder": str(folder / "weights"), "retries": 0}
    engine = {"class_path": "longrl.engines.server.VLLMServerEngine", "init_args": options}
    sampling = {"num_generations": 2, "max_completion_tokens": 16}
    values["rollout"] = rollouts(engine=engine, sampling=sampling, max_staleness=max_staleness, max_mean_mismatch=1.0)
    values["trainer"] |= {"max_steps": steps, "max_epochs": -1}
    values["data"]["prompts_per_batch"] = PROMPTS
    values["checkpoint"] = {"every_n_train_steps": 1000}
    return values


def disturbed_run(folder: Path, values: dict[str, Any], servers: EngineServers, urls: list[str], kills: int) -> int:
    """Kills servers while a run goes on; how many were killed by its end, which must be a normal one."""
    draws = random.Random(7)
    with silent(folder):
        child = start_in_child(folder, values)
    count = 0
    back: list[tuple[float, str]] = []
    """(when, which server is started again)"""
    next_kill = None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        now = time.monotonic()
        if next_kill is None and (folder / "order.jsonl").exists():  # after the first step
            next_kill = now + draws.uniform(0, 0.5)
        for entry in [entry for entry in back if entry[0] <= now]:
            back.remove(entry)
            servers.start(entry[1])
        there = [url for url in urls if url not in {url for _, url in back}]
        if next_kill is not None and now >= next_kill and count < kills and there:
            for url in there if draws.random() < ALL_AT_ONCE else [draws.choice(there)]:
                servers.kill(url)
                back.append((now + draws.uniform(0.1, 1.5), url))
                count += 1
            next_kill = now + draws.uniform(0.2, 1.0)
        time.sleep(0.01)
    for _, url in back:
        servers.start(url)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(f"the run ended with {code}: {folder.parent / f'{folder.name}.log'}")
    return count


def num_lost(folder: Path, max_staleness: int) -> int:
    """Prompts that were read and neither trained on, nor dropped as too old, nor under way at the end."""
    read: list[str] = []
    trained: list[str] = []
    for _, prompts, groups in data_order(folder):
        read += prompts
        trained += [group[0] for group in groups]
    assert len(set(trained)) == len(trained), "a prompt was trained on twice"
    in_flight = (max_staleness + 1) * PROMPTS if max_staleness else 0
    return max(0, len(set(read) - set(trained)) - in_flight - num_dropped(folder))


def num_dropped(folder: Path) -> int:
    """Prompts that `rollout.max_staleness` dropped: their completions were under way for too many steps."""
    return sum(int(float(value)) for (_, name), value in metrics(folder).items() if name == "rollout/dropped")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--kills", type=int, help="of servers, in each run")
    own, others = options.parse_known_args(sys.argv[1:] if argv is None else argv)
    arguments = parse_arguments(__doc__ or "", others)
    kills = own.kills or (QUICK_KILLS if arguments.quick else KILLS)
    steps = STEPS_PER_KILL * kills + 4
    rows: list[dict[str, Any]] = []
    repeated: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [json.dumps({"id": f"{n}", "problem": f"{n} + 1?", "answer": f"{n}"}) for n in range(8 * steps)]
        (folder / "rows.jsonl").write_text("\n".join(lines))
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(text_config(folder / "rows.jsonl")))
        with EngineServers([config], folder / "weights", folder / "servers.log", in_fork=True, **PACE) as servers:
            urls = [servers.start() for _ in range(NUM_SERVERS)]
            for max_staleness in (0, 2):
                values = make_config(folder, max_staleness, steps, urls)
                same = "-"
                if not max_staleness:
                    with silent(folder / "undisturbed"):
                        reference = run(folder / "undisturbed", values)
                started = time.monotonic()
                done = folder / f"staleness_{max_staleness}"
                killed = disturbed_run(done, values, servers, urls, kills)
                seconds = time.monotonic() - started
                found = metrics(done)
                if not max_staleness:
                    same = "yes" if without_counts(found) == without_counts(metrics(reference)) else "no"
                by_step = [float(found.get((step, COUNTS[0]), 0)) for step in range(steps)]
                rows.append({
                    "max_staleness": max_staleness, "servers": NUM_SERVERS, "kills": killed,
                    "steps": len(data_order(done)), "repeated": int(sum(by_step)),
                    "lost": num_lost(done, max_staleness), "dropped": num_dropped(done),
                    "seconds": seconds, "same_as_undisturbed": same,
                })  # fmt: skip
                for step, count in enumerate(by_step):
                    if count:
                        lost = int(float(found[step, COUNTS[1]]))
                        row = {"max_staleness": max_staleness, "step": step, "servers_lost": lost}
                        repeated.append(row | {"completions_repeated": int(count)})
    notes = [f"a step samples {2 * PROMPTS} completions; steps asked for: {steps}"]
    more = {"repeated": repeated} if repeated else {}
    report(__file__, arguments, rows, notes, more)
    if any(row["steps"] != steps or row["lost"] for row in rows):
        console.print("a run did not come to the same end")
        raise SystemExit(1)


def without_counts(found: dict[tuple[int, str], str]) -> dict[tuple[int, str], str]:
    """Metrics but those that count losses."""
    return {key: value for key, value in found.items() if key[1] not in COUNTS}


if __name__ == "__main__":
    main()

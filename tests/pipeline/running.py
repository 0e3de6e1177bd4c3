"""The scripted server as a process, and the pipeline's command on generated videos."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from pathlib import Path

from longrl.commands.main import main
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos
from tests.runs import ROOT, wait_for_group

ROLES = ("captioner", "writer", "policy", "judge")


class Scripted:
    """`tests.pipeline.server` while a test runs."""

    def __init__(self, fault_rate: float = 0.0, delay_s: float = 0.0) -> None:
        command = [sys.executable, "-m", "tests.pipeline.server", str(fault_rate), str(delay_s)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        self.url = f"http://127.0.0.1:{self.process.stdout.readline().strip()}"

    def calls(self) -> list[list[str]]:
        """[key, outcome] of every call so far."""
        with urllib.request.urlopen(self.url + "/calls") as reply:
            return json.load(reply)

    def answered(self) -> Counter[str]:
        """How often each key was answered."""
        return Counter(key for key, outcome in self.calls() if outcome == "answered")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@functools.cache
def videos(count: int = 5, scene_s: float = 2.5) -> Path:
    """Videos of four or five scenes; 112 x 112 pixels, 4 frames per second."""
    folder = Path(tempfile.mkdtemp(prefix="longrl-pipeline-")) / "synthetic"
    generate_videos(folder, SyntheticConfig(count, 0, scene_s=scene_s, size=112))
    return folder / "videos"


def arguments(step: str, out: Path, url: str, source: Path, **options: object) -> list[str]:
    """Command line of a step: clips of one scene, two frames each, four answers per question."""
    endpoint = {"model": "scripted", "url": f"{url}/v1", "timeout_s": 4.0, "backoff_s": 0.02, "concurrency": 4}
    values = {
        **{f"{role}.{name}": value for role in ROLES for name, value in endpoint.items()},
        "videos": source,
        "out": out,
        "prompts": ROOT / "longvideo-reason" / "prompts",
        "split.clip_s": 2.5,
        "split.min_clip_s": 1.0,
        "caption.frames": 2,
        "filter.num_samples": 4,
        "filter.num_frames": 10,
        "export.eval_share": 0.2,
        **{name.replace("__", "."): value for name, value in options.items()},
    }
    return ["pipeline", step, *(f"--{name}={value}" for name, value in values.items())]


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files of a data set."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start_child(args: list[str]) -> int:
    """A command in a forked process, which spares the imports; its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        status = 1
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                main(args)
            status = 0
        finally:
            os._exit(status)
    return child


def kill(child: int) -> None:
    """kill -9, unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def join(child: int) -> int:
    """Waits for its end; its status."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    wait_for_group(child)
    return status

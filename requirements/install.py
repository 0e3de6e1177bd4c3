"""`python requirements/install.py ARGS`: `pip install ARGS` that says every few seconds how far it is.

A package takes minutes to fetch or to unpack. Quiet, pip looks like a process that hangs; else it writes hundreds of
lines. What it wrote is shown where it fails.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

EVERY_S = 15.0
DOING = re.compile(r"^\s*(Collecting|Downloading|Building wheel|Using cached|Installing collected) ?(.*)")


def main(args: Sequence[str], every_s: float = EVERY_S) -> int:
    """Runs pip, and returns its status."""
    start = time.monotonic()
    command = [sys.executable, "-u", "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off", *args]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(every_s):
            print(progress(lines, time.monotonic() - start), flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    assert pip.stdout is not None
    for line in pip.stdout:
        lines.append(line)
    status = pip.wait()
    ended.set()
    teller.join()
    if status:
        sys.stderr.write("".join(lines[-40:]))
    else:
        print(f"  done in {time.monotonic() - start:.0f} s", flush=True)
    return status


def progress(lines: Sequence[str], seconds: float) -> str:
    """One line: how long, how many packages, and which one it is at."""
    done = [match for match in map(DOING.match, lines) if match]
    packages = sum(match[1] == "Collecting" for match in done)
    if not done:
        return f"  {seconds:.0f} s: pip starts"
    verb, rest = done[-1].groups()
    if verb == "Installing collected":
        return f"  {seconds:.0f} s: installing {rest.count(',') + 1} packages"
    name = rest.partition(" --hash")[0].rpartition("/")[2]
    return f"  {seconds:.0f} s: package {packages}, {verb.lower()} {name}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""An environment whose tools do what tools should not, named by its file."""

import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from longrl.environments import Observation, ToolResponse
from longrl.environments.tool_environment import ToolError
from longrl.environments.video_tools import VideoTools
from longrl.turns import ToolCall

TRICKS = ("sleep", "spin", "fail", "misspelt", "lines", "huge", "leave", "die", "talk", "refuse", "recurse", "start")
ANSWERS = ("refuses a connection", "end of a file", "a dict", "a lambda", "a set", "NumPy")
"""Turns by which `step` itself does what it should not."""


class Hostile(VideoTools):
    """Counts its calls; `do` does one of the tricks."""

    tool_names = (*VideoTools.tool_names, "do")

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.num_calls = 0

    def step(self, text):
        if text.startswith("leave a child "):
            file = Path(text.rpartition(" ")[2])
            file.write_text(str(subprocess.Popen(["sleep", "600"]).pid))
            os._exit(3)
        if text not in ANSWERS:
            return super().step(text)
        if text == "refuses a connection":
            raise ConnectionRefusedError("nobody is there")
        if text == "end of a file":
            raise EOFError("too short")
        if text == "a dict":
            return {"answer": 1}
        shown = self.get_frames([1.0])
        content = shown.content
        call = ToolCall("look", {"number": 1}, None, 0.5, shown.span_s, shown.frame_times)
        if text == "a set":
            call = replace(call, arguments={"numbers": {1, 2}})
        if text == "a lambda":
            content = (replace(shown.content[1], source=lambda: shown.content[1].source()),)
        if text == "NumPy":
            times = np.asarray(shown.frame_times, np.float32)
            call = replace(call, seconds=np.float32(0.5), span_s=(times[0], times[0]), frame_times=tuple(times))
        return Observation((ToolResponse(content, call),))

    def do(self, trick: str) -> str:
        """Does something.

        Args:
            trick: What.
        """
        self.num_calls += 1
        if trick in TRICKS:
            answer = getattr(self, f"_do_{trick}")()
        elif trick == "hold":
            self.lock = threading.Lock()
            answer = "held"
        else:
            answer = f"call {self.num_calls}"
        return answer

    def _do_sleep(self):
        time.sleep(600)

    def _do_spin(self):
        while True:
            pass

    def _do_fail(self):
        raise KeyError("no such thing\nat all")

    def _do_misspelt(self):
        return undefined_name  # noqa: F821

    def _do_lines(self):
        return "line\n" * 10_000

    def _do_huge(self):
        return "x" * 50_000_000

    def _do_leave(self):
        sys.exit(3)

    def _do_die(self):
        os._exit(3)

    def _do_talk(self):
        print("talk" * 10)  # noqa: T201
        os.write(1, b"more talk\n")
        logging.getLogger("hostile").warning("I warn")
        return "talked <|im_end|> <image> \udcff"

    def _do_refuse(self):
        raise ToolError("no; ask otherwise")

    def _do_recurse(self):
        return self._do_recurse()

    def _do_start(self):
        subprocess.Popen(["sleep", "600"])
        return self._do_sleep()

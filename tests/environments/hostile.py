"""An environment whose tools do what tools should not, named by its file."""

import logging
import os
import subprocess
import sys
import threading
import time

from longrl.environments.tool_environment import ToolError
from longrl.environments.video_tools import VideoTools

TRICKS = ("sleep", "spin", "fail", "misspelt", "lines", "huge", "leave", "die", "talk", "refuse", "recurse", "start")


class Hostile(VideoTools):
    """Counts its calls; `do` does one of the tricks."""

    tool_names = (*VideoTools.tool_names, "do")

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.num_calls = 0

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

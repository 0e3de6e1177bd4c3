"""A selection of the user's own: a function in a file or by its import path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from longrl.datamodules.selection.candidates import Candidates
from longrl.datamodules.selection.frame_selection import FrameSelection, source_digest
from longrl.io.functions import import_function

OPTION = "data.selection.init_args.function"
ARGUMENTS = ("video", "question", "count")


@dataclass(frozen=True)
class UserFunction(FrameSelection):
    """Moments by a function `(video, question, count) -> seconds`, as `FrameSelection.choose` says.

    Example:
        `UserFunction(function="my_frames.py:last_ones")` with
        `def last_ones(video, question, count): return video.times[-count:]`
    """

    function: str = ""
    """`file.py:function` or an import path. It runs in loader workers, and must choose alike in every process."""

    reads_question: ClassVar[bool] = True

    @override
    def check(self) -> None:
        self._function()

    @override
    def identity(self) -> dict[str, Any]:
        name = self.function.rpartition("/")[2]  # wherever the file lies
        return {**super().identity(), "function": name, "file": source_digest(self._function())}

    @override
    def choose(self, video: Candidates, question: str, count: int) -> Sequence[float]:
        return self._function()(video, question, count)

    def _function(self) -> Callable[..., Any]:
        return import_function(self.function, OPTION, ARGUMENTS)

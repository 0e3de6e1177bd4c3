"""A picture on the terminal that is drawn anew a few times per second, by a thread beside the training."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

logger = logging.getLogger(__name__)

EVERY_S = 0.25
"""Between two pictures; drawing takes some thousandths."""


class LiveDisplay:
    """Draws what `render` returns at the bottom of the terminal; what is logged meanwhile scrolls by above.

    Args:
        render: makes the picture; called in a thread.
        console: where it is drawn; None is the standard output.
    """

    def __init__(self, render: Callable[[Console], RenderableType], console: Console | None = None) -> None:
        self._render = render
        self._console = console or Console()
        self._lock = threading.RLock()
        """Held while drawing, and while the process forks: a child would inherit locks that nobody opens."""
        self._ended = threading.Event()
        self._streams: tuple[Any, Any] = (sys.stdout, sys.stderr)
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        """Handlers of logs that write past `sys.stderr`, and where to."""
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            vertical_overflow="crop",
            # Errors that go to a file stay there.
            redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
        )
        _displays.add(self)

    def start(self) -> None:
        """Begins to draw."""
        self._streams = (sys.stdout, sys.stderr)
        self._live.start()
        self._redirect_logs()
        thread = threading.Thread(
            target=self._draw_until_end,
            name="longrl-view",
            daemon=True,
        )
        thread.start()

    def draw(self) -> None:
        """Draws once, now."""
        with self._lock:
            picture = self._render(self._console)
            self._live.update(picture, refresh=True)

    def stop(self) -> None:
        """Leaves the last picture where it is, and the terminal as it was."""
        if self._ended.is_set():
            return
        self._ended.set()
        with self._lock:
            self._restore_logs()
            self._live.stop()

    def _draw_until_end(self) -> None:
        while not self._ended.wait(EVERY_S):
            try:
                self.draw()
            except Exception as error:  # a view must not cost a run: the terminal may be gone
                with contextlib.suppress(Exception):
                    self.stop()
                logger.warning("the view ends, for drawing it failed: %r; the run goes on", error)

    # -- logs ----------------------------------------------------------------------------------------------------

    def _redirect_logs(self) -> None:
        """Has log handlers write above the picture, which remember the stream that they began with."""
        names = list(logging.root.manager.loggerDict)
        for one in [logging.root, *map(logging.getLogger, names)]:
            for handler in one.handlers:
                if isinstance(handler, logging.StreamHandler):
                    self._redirect(handler)

    def _redirect(self, handler: logging.StreamHandler[Any]) -> None:
        before = handler.stream
        for stream, now in zip(self._streams, (sys.stdout, sys.stderr), strict=True):
            if before is stream and now is not stream:
                handler.setStream(now)
                self._handlers.append((handler, before))

    def _restore_logs(self) -> None:
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()

    # -- forks ---------------------------------------------------------------------------------------------------

    def before_fork(self) -> None:
        """No picture is half drawn in a child."""
        self._lock.acquire()

    def after_fork(self) -> None:
        """In the parent: goes on."""
        self._lock.release()

    def in_child(self) -> None:
        """A child draws nothing, and writes where its parent did before."""
        self._lock.release()
        if self._ended.is_set():
            return
        self._ended.set()
        sys.stdout, sys.stderr = self._streams
        self._restore_logs()


_displays: weakref.WeakSet[LiveDisplay] = weakref.WeakSet()


def _each(name: str) -> Callable[[], None]:
    def call() -> None:
        for display in list(_displays):
            getattr(display, name)()

    return call


os.register_at_fork(
    before=_each("before_fork"),
    after_in_parent=_each("after_fork"),
    after_in_child=_each("in_child"),
)

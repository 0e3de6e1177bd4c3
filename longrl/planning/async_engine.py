"""An engine in simulated time: requests that decode side by side, and their groups."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

EPSILON = 1e-9


@dataclass
class SimulatedGroup:
    """A prompt and its completions."""

    lengths: Sequence[int]
    number: int = -1
    """In the order in which prompts were submitted."""
    attempts: int = 0
    """How often it was submitted."""
    version: int | None = None
    """Of the weights that sample its first token; None before."""
    unfinished: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)
    """Depth at the start and at the end of each completion."""


@dataclass(order=True)
class _Request:
    order: tuple[int, int]
    group: SimulatedGroup = field(compare=False)
    tokens: int = field(compare=False)
    start: float = field(compare=False, default=0.0)

    @property
    def is_cancelled(self) -> bool:
        return self.order[0] != self.group.number


class SimulatedEngine:
    """Slots that decode together: a step of `n` requests takes `token_s + request_s * n` seconds, a token for each.

    Args:
        slots: requests that decode at once; others wait, in the order of their groups.
        token_s: seconds of a decoding step whatever the number of requests.
        request_s: seconds more of it for each request.
    """

    def __init__(self, slots: int, token_s: float, request_s: float) -> None:
        self.slots = slots
        self.token_s = token_s
        self.request_s = request_s
        self.time = 0.0
        self.depth = 0.0
        """Decoding steps so far: what every request under way gains alike."""
        self.busy_s = 0.0
        """Seconds in which a request was under way."""
        self.request_seconds = 0.0
        """The same, times their number."""
        self.finished: list[SimulatedGroup] = []
        """Groups whose completions have all ended and that nobody took yet."""
        self.version = 0
        self._versions: list[tuple[float, int]] = [(0.0, 0)]
        """Depth from which weights sampled, and their version."""
        self._running: list[tuple[float, tuple[int, int], _Request]] = []
        """A heap by the depth at which each ends; cancelled ones stay in it."""
        self._waiting: list[_Request] = []
        """A heap by order."""
        self._num_running = 0
        self._sum_of_starts = 0.0
        self._stalled_s = 0.0
        """Seconds until decoding goes on: keys and values are computed anew."""
        self._num_ended = 0
        self._num_submitted = 0

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return self._num_running

    @property
    def num_tokens_so_far(self) -> float:
        """Tokens that requests under way have sampled."""
        return self._num_running * self.depth - self._sum_of_starts

    def submit(self, group: SimulatedGroup) -> None:
        """Asks for a group's completions, from their first token on."""
        group.number = self._num_submitted
        group.attempts += 1
        group.unfinished = len(group.lengths)
        group.version = None
        group.spans = []
        self._num_submitted += 1
        for index, tokens in enumerate(group.lengths):
            heapq.heappush(self._waiting, _Request((group.number, index), group, tokens))
        self._fill()

    def cancel(self, group: SimulatedGroup) -> None:
        """Ends what is under way of a group; `submit` asks again."""
        for _, (number, _), request in self._running:
            if number == group.number:
                self._leave(request)
        group.number = -1
        self._waiting = [request for request in self._waiting if not request.is_cancelled]
        heapq.heapify(self._waiting)
        self._fill()

    def set_weights(self, version: int, pause_s: float, recomputed_s: float) -> None:
        """New weights: nothing decodes for `pause_s`, then `recomputed_s` pass before a further token is there."""
        self.time += pause_s
        self.version = version
        self._versions.append((self.depth, version))
        self._stalled_s += recomputed_s

    def advance(self, until: float) -> None:
        """On to a time."""
        while self._num_running and self.time < until:
            self._step(until)
        self.time = max(self.time, until)

    def advance_to_end_of_one(self) -> None:
        """On until a completion ends."""
        assert self._num_running, "nothing is under way that could end"
        before = self._num_ended
        while self._num_ended == before:
            self._step(float("inf"))

    def token_counts(self, group: SimulatedGroup) -> dict[int, float]:
        """Version -> tokens of a finished group that its weights sampled."""
        counts: dict[int, float] = {}
        depths = [depth for depth, _ in self._versions]
        for start, stop in group.spans:
            first = bisect_right(depths, start) - 1
            for index in range(first, len(depths)):
                if depths[index] >= stop and index > first:
                    break
                end = min(stop, depths[index + 1]) if index + 1 < len(depths) else stop
                tokens = end - max(start, depths[index])
                version = self._versions[index][1]
                counts[version] = counts.get(version, 0.0) + max(0.0, tokens)
        return counts

    # -- inside --------------------------------------------------------------------------------------------------

    def _step(self, until: float) -> None:
        """On to the next end of a completion, or to `until` if that comes first."""
        stall = min(self._stalled_s, until - self.time)
        self._pass(stall)
        self._stalled_s -= stall
        if self.time >= until:
            return
        seconds_per_token = self.token_s + self.request_s * self._num_running
        depth = self._next_end()
        seconds = (depth - self.depth) * seconds_per_token
        if self.time + seconds > until:
            left = until - self.time
            self._pass(left)
            self.time = until
            self.depth += left / seconds_per_token
            return
        self._pass(seconds)
        self.depth = depth
        while self._running and self._running[0][0] <= depth + EPSILON:
            request = heapq.heappop(self._running)[2]
            if not request.is_cancelled:
                self._end(request)
        self._fill()

    def _next_end(self) -> float:
        while self._running[0][2].is_cancelled:
            heapq.heappop(self._running)
        return self._running[0][0]

    def _pass(self, seconds: float) -> None:
        self.time += seconds
        self.busy_s += seconds
        self.request_seconds += seconds * self._num_running

    def _end(self, request: _Request) -> None:
        self._leave(request)
        self._num_ended += 1
        group = request.group
        group.spans.append((request.start, self.depth))
        group.unfinished -= 1
        if not group.unfinished:
            self.finished.append(group)

    def _leave(self, request: _Request) -> None:
        self._num_running -= 1
        self._sum_of_starts -= request.start

    def _fill(self) -> None:
        """Waiting requests take free slots."""
        while self._waiting and self._num_running < self.slots:
            request = heapq.heappop(self._waiting)
            request.start = self.depth
            if request.group.version is None:
                request.group.version = self.version
            self._num_running += 1
            self._sum_of_starts += request.start
            # Two that end together are told apart by their order.
            heapq.heappush(self._running, (self.depth + request.tokens, request.order, request))

"""`RolloutEncoder`: media that environments show are encoded once in a rollout, whoever asks for them and when.

Whoever first asks for a media item claims it: its process decodes it, and others wait for its features.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch
from torch import Tensor, nn

from longrl.features.cache import distinct_media, encode_shard
from longrl.models.base import CausalFamily
from longrl.strategies.parallel import SINGLE_RANK_GRID
from longrl.types import Media, Observed

IDLE_S = 5.0
"""Without a job for so long the thread ends."""


class RolloutEncoder:
    """Encodes media in a thread of its own, as the thread that makes it would.

    Args:
        family: whose encoder encodes.
        model: has the encoder.
        features: {media key: [N, D]} of the rollout; what is there is not encoded.
    """

    def __init__(self, family: CausalFamily, model: nn.Module, features: MutableMapping[str, Tensor]) -> None:
        self._family = family
        self._model = model
        self._features = features
        self._lock = threading.Lock()
        self._claimed: dict[str, Future[None]] = {}
        """Media keys, and when their features are there."""
        self._context = CallerContext(model)
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def claims(self) -> Iterator[Claims]:
        """What one turn claims; what it has not encoded in the end others may claim."""
        claims = Claims(self)
        try:
            yield claims
        finally:
            claims.release()

    def claim(self, key: str) -> bool:
        """True if a media item is nobody's and has no features."""
        with self._lock:
            if key in self._claimed or key in self._features:
                return False
            self._claimed[key] = Future()
            return True

    def release(self, key: str) -> None:
        """Lets others claim it."""
        with self._lock:
            self._claimed.pop(key).set_result(None)

    def wait(self, key: str) -> bool:
        """Waits for the features of a media item; False if whoever claimed it gave up."""
        with self._lock:
            if key in self._features:
                return True
            done = self._claimed.get(key)
        if done is None:
            return False
        done.result()
        return key in self._features

    def submit(self, job: Callable[[], None]) -> None:
        """Has the thread do something, in the order given."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
                self._thread.start()
            self._jobs.put(job)

    def encode(self, item: Media) -> None:
        """Encodes a claimed item, in the thread."""
        with self._lock:
            done = self._claimed[item.key]
        try:
            local = replace(item, source=None) if len(item.patches) else item
            # One by one and in parts, as `FeatureCache` encodes: a feature must not depend on what it was encoded with.
            rows = encode_shard(self._family, self._model, [local], SINGLE_RANK_GRID, one_by_one=True)
            self._features[item.key] = rows
        except BaseException as error:
            done.set_exception(error)
            raise
        done.set_result(None)

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=IDLE_S)
            except queue.Empty:
                with self._lock:
                    if self._jobs.empty():  # the rollout is done, or another thread will go on
                        self._thread = None
                        return
                continue
            with self._context.entered(), torch.no_grad():
                job()


class Claims:
    """The media that one turn has claimed.

    Args:
        encoder: of all turns.
    """

    def __init__(self, encoder: RolloutEncoder) -> None:
        self._encoder = encoder
        self._keys: set[str] = set()

    def needed(self, keys: Sequence[str]) -> frozenset[str]:
        """Of some media those that nobody has or encodes: they are claimed now."""
        mine = {key for key in keys if key in self._keys or self._encoder.claim(key)}
        self._keys |= mine
        return frozenset(mine)

    def encode(self, observed: Observed, future: Future[Observed | None]) -> bool:
        """Sets a future to what is shown, without pixels, once all features of it are there.

        Returns:
            False if whoever claimed a part of it gave up: then its pixels are nowhere, and the turn must be asked anew.
        """
        media = distinct_media([observed])
        of_others = [item.key for item in media if item.key not in self._keys]
        # 1. Own ones first, for others may wait for them.
        for item in media:
            if item.key in self._keys:
                self._submit(item, future)
        # 2. Those of others.
        if not all(self._encoder.wait(key) for key in of_others):
            return False
        # 3. The thread does one after the other, so that all are done then.
        shown = tuple(replace(item, patches=item.patches[:0].clone()) for item in observed.media)

        def finish() -> None:
            if not future.done():
                future.set_result(replace(observed, media=shown))

        self._encoder.submit(finish)
        return True

    def release(self) -> None:
        """Gives up what was claimed and not encoded."""
        for key in self._keys:
            self._encoder.release(key)
        self._keys.clear()

    def _submit(self, item: Media, future: Future[Observed | None]) -> None:
        self._keys.discard(item.key)

        def encode() -> None:
            try:
                self._encoder.encode(item)
            except BaseException as error:  # it ends the run, in the thread that waits for the future
                if not future.done():
                    future.set_exception(error)

        self._encoder.submit(encode)


class CallerContext:
    """Autocast of the thread that makes it, and its stream on a model's device, for another one.

    Args:
        model: that computes; the thread that makes this may have no device of its own, and the current one is the
            first then, whatever the rank.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        self._autocast = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
        device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The same in this thread."""
        with contextlib.ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self._stream.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))  # its cache is every thread's
            yield

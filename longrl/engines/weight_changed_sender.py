"""Weights as files of what changed in them since a server was last given some, for slow networks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from longrl.engines.server_client import ServerClient
from longrl.engines.vllm_extension import write_shards
from longrl.engines.weight_changes import ChangeLog, write_checksums
from longrl.engines.weight_checks import Shapes, expected_weights
from longrl.engines.weight_senders import Counted, all_gathered, shared_folder
from longrl.engines.weight_stream import WeightStream
from longrl.strategies.axis import world_axis

logger = logging.getLogger(__name__)


class ChangedSender:
    """Files with the numbers that changed, in a folder that trainer and servers share.

    Servers keep the weights of before and put the changes in while they go on sampling; then they load them. One that
    has other weights, or none, is sent all. Rank 0 holds one set of weights in the engine's precision on the host, and
    so does every server.

    Args:
        folder: seen by server and trainer under this name; it needs room for one set of weights, or two while some
            servers are sent all and others changes.
        shard_mib: size of its files.
    """

    kept: tuple[Path, str] | None = None

    def __init__(self, folder: Path, shard_mib: int) -> None:
        self.folder = folder
        self.shard_mib = shard_mib
        self._log = ChangeLog()
        self._sent_version = ""
        self._expected: Shapes = {}

    def send(
        self,
        weights: WeightStream,
        clients: Sequence[ServerClient],
        version: str,
        pause: Callable[[], AbstractContextManager[None]],
    ) -> int:
        """See `WeightSender.send`."""
        world = world_axis()
        base = world.gather(self._sent_version)[0]
        with world.raise_on_any_rank():
            lacks_base = [not base or client.get_info()["kept"] != base for client in clients]
        of_all = [lacks for of_rank in world.gather(lacks_base) for lacks in of_rank]
        if not base or all(of_all):
            base = ""
        with shared_folder(self.folder) as folder:
            with world.raise_on_any_rank():
                num_bytes = self._write(weights, folder, from_nothing=not base, also_all=any(of_all), version=version)
            with world.raise_on_any_rank():
                for client, lacks in zip(clients, lacks_base, strict=True):
                    order = {"version": version, "base": "" if lacks else base}
                    client.order_weights({**order, "changes": str(folder / ("all" if lacks and base else "changes"))})
            with pause(), world.raise_on_any_rank():
                for client in clients:
                    client.order_weights({"version": version, "kept": True})
        return world.gather(num_bytes)[0]

    def close(self) -> None:
        """Forgets what was sent; the next weights are sent whole."""
        self._log.begin(from_nothing=True)
        self._sent_version = ""

    def _write(self, weights: WeightStream, folder: Path, *, from_nothing: bool, also_all: bool, version: str) -> int:
        """Bytes that rank 0 writes; other ranks go through the weights.

        Args:
            weights: of the policy.
            folder: gets `changes`, and with `also_all` `all` for servers that lack the base of these.
            from_nothing: `changes` are all weights.
            also_all: some servers need all.
            version: of the weights.
        """
        gathered = Counted(weights)
        with all_gathered(gathered, folder):
            if world_axis().rank:
                write_shards(gathered, None, 0)
                return 0
            if not self._expected:
                self._expected = expected_weights(weights.family)
            self._sent_version = ""  # until all is written, what is kept here is neither these weights nor those
            self._log.begin(from_nothing)
            written = Counted(self._log.changes(gathered, self._expected))
            write_shards(written, folder / "changes", self.shard_mib << 20)
            write_checksums(folder / "changes", self._log.checksums)
            num_bytes = written.num_bytes
            if also_all and not from_nothing:
                written = Counted(self._log.everything(self._expected))
                write_shards(written, folder / "all", self.shard_mib << 20)
                write_checksums(folder / "all", self._log.checksums)
                num_bytes += written.num_bytes
            self._sent_version = version
        return num_bytes

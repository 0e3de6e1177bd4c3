"""Shared memory that is too small for what loader workers hand over, as in a container with docker's 64 MiB."""

import pytest
import torch

from longrl.datamodules.loading import workers
from longrl.datamodules.loading.workers import IPCPayload, SharedMemoryFull, warn_of_small_shared_memory
from longrl.io.processes import lost_worker_in

REMEDY = r"docker run --shm-size=16g or --ipc=host.*data\.num_workers=0"


@pytest.fixture
def docker(monkeypatch):
    """64 MiB of shared memory, of which a worker waits no time for more."""
    monkeypatch.setattr(workers, "free_shared_bytes", lambda: 64 << 20)
    monkeypatch.setattr(workers, "WAIT_FOR_ROOM_S", 0.0)


@pytest.mark.usefixtures("docker")
def test_what_does_not_fit_is_an_error_with_its_remedy_and_no_bus_error():
    payload = IPCPayload.pack_shared({"patches": torch.empty(65 << 20, dtype=torch.uint8)})
    assert payload.shared == []  # nothing was written there, which would have killed the worker
    with pytest.raises(SharedMemoryFull, match=rf"has 65 MiB to hand over, .* has 64 MiB free\. .*{REMEDY}"):
        payload.unpack()


@pytest.mark.usefixtures("docker")
def test_what_fits_is_handed_over_in_shared_memory():
    patches = torch.arange(2 << 20, dtype=torch.uint8)
    payload = IPCPayload.pack_shared({"patches": patches})
    assert payload.shared[0].is_shared()
    assert torch.equal(payload.unpack()["patches"], patches)


@pytest.mark.usefixtures("docker")
@pytest.mark.parametrize(("num_items", "warned"), [(2, False), (3, True)])
def test_too_little_room_is_said_before_the_first_step(num_items, warned, caplog):
    warn_of_small_shared_memory(num_items, 30 << 20)
    assert ("--shm-size" in caplog.text) == warned


def test_a_worker_that_died_of_a_full_shared_memory_is_not_said_to_lack_memory():
    """Two workers may have seen the same room."""
    said = "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that workers are out of shm."
    message = lost_worker_in(RuntimeError(said))
    assert message.startswith("a loader worker (pid 12) is out of shared memory: ")
    assert "--shm-size=16g or --ipc=host" in message
    killed = lost_worker_in(RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed."))
    assert killed.startswith("a loader worker (pid 12) is dead: the kernel kills one where memory runs out")

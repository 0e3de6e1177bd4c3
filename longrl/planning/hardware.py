"""The devices a run is planned for. Peaks are the makers' dense bfloat16 numbers; nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

from longrl.models.step_flops import PEAK_FLOPS

GB = 10**9
GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """Nodes of equal devices.

    Example:
        `HARDWARE["H100"]`
    """

    name: str
    memory_gib: float
    """Memory of a device, as torch reports it."""
    flops: float
    """Dense bfloat16 operations per second of a device."""
    memory_bandwidth: float
    """Bytes per second of a device."""
    node_bandwidth: float
    """Bytes per second that a device sends to others of its node."""
    network_bandwidth: float
    """Bytes per second that a device sends to other nodes."""
    devices: int = 8
    """Devices of a node."""
    host_bandwidth: float = 64 * GB
    """Bytes per second between a device and its host's memory, one way."""

    @property
    def memory_bytes(self) -> float:
        """Memory of a device."""
        return self.memory_gib * GIB

    def bandwidth_among(self, ranks: int) -> float:
        """Bytes per second that a device sends to the others of so many."""
        return self.node_bandwidth if ranks <= self.devices else self.network_bandwidth


HARDWARE = {
    "A100": Hardware("A100-80G", 79.1, PEAK_FLOPS["A100"], 2_039 * GB, 300 * GB, 25 * GB, host_bandwidth=32 * GB),
    "H100": Hardware("H100-80G", 79.1, PEAK_FLOPS["H100"], 3_350 * GB, 450 * GB, 50 * GB),
    "H200": Hardware("H200-141G", 139.7, PEAK_FLOPS["H200"], 4_800 * GB, 450 * GB, 50 * GB),
}
"""SXM boards with NVLink; between nodes one 200 or 400 Gbit/s port per device; to the host PCIe 4 or 5, 16 lanes."""


def find_hardware(name: str, memory_gib: float | None = None, devices: int | None = None) -> Hardware:
    """A kind of node by name, with another memory or number of devices if given.

    Raises:
        ValueError: there is no such kind, or a number is not positive.
    """
    if name not in HARDWARE:
        raise ValueError(f"--hardware must be one of {', '.join(HARDWARE)}, got {name!r}; for another device add "
                         "--memory_gib and --devices to the nearest of them")  # fmt: skip
    known = HARDWARE[name]
    for option, value in (("memory_gib", memory_gib), ("devices", devices)):
        if value is not None and value <= 0:
            raise ValueError(f"--{option} must be positive, got {value}; leave it out for the one of {name}")
    return replace(known, memory_gib=memory_gib or known.memory_gib, devices=devices or known.devices)

# SPDX-License-Identifier: Apache-2.0
"""What machines are made of, from data sheets: nothing here was measured.

Sources: NVIDIA's whitepapers and data sheets (memory, its bandwidth, dense arithmetic of float32
without tensor cores and of bfloat16 with float32 sums), PCI-SIG (bytes per second of a lane after
its encoding), data sheets of disks (sequential reads).
"""

from __future__ import annotations

from typing import NamedTuple

# How much of such a figure programs reach. What is usual, not what is best: large copies reach
# four fifths of a PCIe link (25 of 31.5 GB/s), large products about three quarters of the
# arithmetic, and operators that only read and write about 85 % of the memory's bandwidth.
LINK_SHARE, ARITHMETIC_SHARE, MEMORY_SHARE, DISK_SHARE = 0.8, 0.75, 0.85, 0.9

# Seconds that are usual on a desktop: for a copy to begin, for the host to issue an operator from
# Python or to record an event.
LINK_LATENCY, ISSUE, EVENT = 10e-6, 5e-6, 1e-6


class Gpu(NamedTuple):
    """Bytes of memory, bytes per second in it, operations per second in float32 and in bfloat16,
    and bytes per second to a neighbour over NVLink (0: it has none).
    """

    memory: int
    bandwidth: float
    flops: float
    half_flops: float
    nvlink: float = 0.0


BRIDGE = 100e9  # bytes per second: an NVLink of less is a bridge between two boards
GPUS = {
    "rtx3060": Gpu(12 << 30, 360e9, 12.7e12, 25.5e12),
    "rtx3080": Gpu(10 << 30, 760e9, 29.8e12, 59.5e12),
    "rtx3090": Gpu(24 << 30, 936e9, 35.6e12, 71e12, 56.25e9),
    "rtx4060ti": Gpu(16 << 30, 288e9, 22.1e12, 44.1e12),
    "rtx4070": Gpu(12 << 30, 504e9, 29.1e12, 58.3e12),
    "rtx4080": Gpu(16 << 30, 717e9, 48.7e12, 97.5e12),
    "rtx4090": Gpu(24 << 30, 1008e9, 82.6e12, 165.2e12),
    "rtx5060ti": Gpu(16 << 30, 448e9, 23.7e12, 47.4e12),
    "rtx5070": Gpu(12 << 30, 672e9, 30.9e12, 61.7e12),
    "rtx5070ti": Gpu(16 << 30, 896e9, 43.9e12, 87.9e12),
    "rtx5080": Gpu(16 << 30, 960e9, 56.3e12, 112.6e12),
    "rtx5090": Gpu(32 << 30, 1792e9, 104.8e12, 209.5e12),
    "a6000": Gpu(48 << 30, 768e9, 38.7e12, 154.8e12, 56.25e9),
    "l40s": Gpu(48 << 30, 864e9, 91.6e12, 362e12),
    "a100": Gpu(80 << 30, 2039e9, 19.5e12, 312e12, 300e9),
    "h100": Gpu(80 << 30, 3350e9, 67e12, 989e12, 450e9),
    "h200": Gpu(140 << 30, 4800e9, 67e12, 989e12, 450e9),
}

# Bytes per second and direction of one lane, by generation.
PCIE_LANE = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}
PCIE_LANES = (1, 2, 4, 8, 16)


class Disk(NamedTuple):
    """Bytes, bytes per second of long reads, and seconds until a read begins."""

    size: int
    rate: float
    latency: float


DISKS = {
    "sata": Disk(10**12, 0.55e9, 100e-6),
    "nvme3": Disk(10**12, 3.5e9, 80e-6),
    "nvme4": Disk(10**12, 7.0e9, 80e-6),
    "nvme5": Disk(10**12, 14.0e9, 80e-6),
}

"""distorch runs PyTorch models whose weights do not fit on the compute device.

The weights live on donors (system RAM, disk, later other GPUs) and arrive just in time, with the
same output bits.
"""

from distorch.api import distribute, plan, redistribute, undistribute
from distorch.errors import DistorchError, FetchError, FormatError, PlacementError, SpecError
from distorch.load import load
from distorch.planner import Plan
from distorch.report import Report, Stats, report, reset_stats, stats
from distorch.runtime.machine import devices
from distorch.sharded import ShardedParameter, fetch_count, is_sharded, materialize, shard

__version__ = "0.1.0"

__all__ = [
    "DistorchError",
    "FetchError",
    "FormatError",
    "PlacementError",
    "Plan",
    "Report",
    "ShardedParameter",
    "SpecError",
    "Stats",
    "devices",
    "distribute",
    "fetch_count",
    "is_sharded",
    "load",
    "materialize",
    "plan",
    "redistribute",
    "report",
    "reset_stats",
    "shard",
    "stats",
    "undistribute",
]

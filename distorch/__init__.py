"""distorch runs PyTorch models whose weights do not fit on the compute device.

The weights live on donors (system RAM, disk, other devices) and arrive just in time, with the
same output bits.
"""

from distorch.api import distribute, plan, redistribute, undistribute
from distorch.errors import DistorchError, FetchError, FormatError, PlacementError, SpecError
from distorch.loading import load
from distorch.patching import finish_merging, set_loras
from distorch.planner import Plan
from distorch.report import Report, Stats, report, reset_stats, stats
from distorch.runtime.links import Calibration, calibrate, devices
from distorch.sharded import ShardedParameter, fetch_count, is_sharded, materialize, shard
from distorch.trace import profiling, trace

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "DistorchError",
    "FetchError",
    "FormatError",
    "PlacementError",
    "Plan",
    "Report",
    "ShardedParameter",
    "SpecError",
    "Stats",
    "calibrate",
    "devices",
    "distribute",
    "fetch_count",
    "finish_merging",
    "is_sharded",
    "load",
    "materialize",
    "plan",
    "profiling",
    "redistribute",
    "report",
    "reset_stats",
    "set_loras",
    "shard",
    "stats",
    "trace",
    "undistribute",
]

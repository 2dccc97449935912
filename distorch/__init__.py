# SPDX-License-Identifier: Apache-2.0
"""distorch runs PyTorch models whose weights do not fit on the compute device.

The weights live on donors (system RAM, disk, other devices) and arrive just in time, with the
same output bits.
"""

from distorch.api import distribute, redistribute, undistribute
from distorch.display.picture import Picture
from distorch.errors import (
    DistorchError,
    FetchError,
    FormatError,
    PlacementError,
    PlacementWarning,
    SpecError,
)
from distorch.loading import init_empty_weights, load, plan
from distorch.machine.calibration import Calibration
from distorch.machine.links import calibrate, devices
from distorch.machine.profiles import Machine
from distorch.patching import finish_merging, set_loras
from distorch.planner import Plan
from distorch.prediction import (
    Curve,
    LinkUse,
    Prediction,
    Step,
    Use,
    curve,
    estimate_step,
    predict,
    record_step,
)
from distorch.reporting import Report, Stats, report, reset_stats, stats
from distorch.sharded import ShardedParameter, fetch_count, is_sharded, materialize, shard
from distorch.timeline import Span, Timeline
from distorch.tracing import profiling, trace

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Curve",
    "DistorchError",
    "FetchError",
    "FormatError",
    "PlacementError",
    "PlacementWarning",
    "LinkUse",
    "Machine",
    "Picture",
    "Plan",
    "Prediction",
    "Report",
    "ShardedParameter",
    "Span",
    "SpecError",
    "Stats",
    "Step",
    "Timeline",
    "Use",
    "calibrate",
    "curve",
    "devices",
    "distribute",
    "estimate_step",
    "fetch_count",
    "finish_merging",
    "init_empty_weights",
    "is_sharded",
    "load",
    "materialize",
    "plan",
    "predict",
    "profiling",
    "record_step",
    "redistribute",
    "report",
    "reset_stats",
    "set_loras",
    "shard",
    "stats",
    "trace",
    "undistribute",
]

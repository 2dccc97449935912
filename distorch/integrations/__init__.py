# SPDX-License-Identifier: Apache-2.0
"""Models of diffusers and transformers, streamed to their places in a line.

Neither library is imported before it is needed.
"""

from distorch.integrations.pipeline import (
    distribute_pipeline,
    load_pipeline,
    set_pipeline_loras,
    undistribute_pipeline,
)
from distorch.integrations.pipeline_report import PipelineReport, pipeline_report
from distorch.integrations.pretrained import load_pretrained

__all__ = [
    "PipelineReport",
    "distribute_pipeline",
    "load_pipeline",
    "load_pretrained",
    "pipeline_report",
    "set_pipeline_loras",
    "undistribute_pipeline",
]

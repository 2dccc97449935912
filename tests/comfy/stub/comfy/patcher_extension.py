# SPDX-License-Identifier: Apache-2.0
"""Names of callbacks and wrappers."""


class CallbacksMP:
    ON_LOAD, ON_DETACH = "on_load", "on_detach"


class WrappersMP:
    SAMPLER_SAMPLE = "sampler_sample"

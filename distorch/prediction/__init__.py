# SPDX-License-Identifier: Apache-2.0
"""What a step will take with a placement: recorded once, predicted for any other."""

from distorch.prediction.curve import Curve, curve
from distorch.prediction.estimating import estimate_step
from distorch.prediction.predict import predict
from distorch.prediction.predicted import LinkUse, Prediction
from distorch.prediction.recording import record_step
from distorch.step import Step, Use

__all__ = [
    "Curve",
    "LinkUse",
    "Prediction",
    "Step",
    "Use",
    "curve",
    "estimate_step",
    "predict",
    "record_step",
]

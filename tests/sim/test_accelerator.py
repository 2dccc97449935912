# SPDX-License-Identifier: Apache-2.0
"""What tests/gpu runs on a GPU, here on the simulated accelerator."""

from tests.accelerator.kernels import *  # noqa: F403
from tests.accelerator.memory import *  # noqa: F403
from tests.accelerator.models import *  # noqa: F403
from tests.accelerator.streams import *  # noqa: F403

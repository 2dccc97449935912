# SPDX-License-Identifier: Apache-2.0
"""How much is tested: `make test` takes a part of long sweeps, `make test-all` everything."""

import os

ALL = os.environ.get("DISTORCH_TESTS") == "all"

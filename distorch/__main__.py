# SPDX-License-Identifier: Apache-2.0
"""python -m distorch"""

import sys

from distorch.cli import main

sys.exit(main())

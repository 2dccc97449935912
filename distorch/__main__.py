"""python -m distorch"""

import sys

from distorch.cli import main

sys.exit(main())

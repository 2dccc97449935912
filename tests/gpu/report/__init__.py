# SPDX-License-Identifier: Apache-2.0
"""What an owner of a GPU runs and sends in: `python -m tests.gpu.report --out DIR`.

The process that conducts the report imports neither torch nor distorch: whatever a child does,
crash, hang or lose the device, the results of all others are kept.
"""

# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks of distorch stand on. Never imported by distorch itself."""

# SPDX-License-Identifier: Apache-2.0
"""The demo: a digit transformer with most of its weights on disk."""

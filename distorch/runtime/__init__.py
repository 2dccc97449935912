# SPDX-License-Identifier: Apache-2.0
"""Placement of a module's weights: from a plan to tensors on donors, and back."""

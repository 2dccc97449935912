"""Placement of a module's weights: from a plan to tensors on donors, and back."""

# SPDX-License-Identifier: Apache-2.0
"""A stand-in for ComfyUI: the part of its contract that the node pack relies on, written anew."""

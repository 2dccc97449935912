# SPDX-License-Identifier: Apache-2.0
"""What people look at: tables, pictures and progress bars. Nothing here knows what a module is."""

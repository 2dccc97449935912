# SPDX-License-Identifier: Apache-2.0
"""Questions that only a device can answer, each in a process of its own: `probes NAME --device cuda`.

A probe prints one line of JSON. What it finds `wrong` (a list of sentences) makes it fail; all else
is told as it was measured.
"""

# Those that take times come first: they get the lock while the others are still being imported.
TIMED = ("events", "freeing", "pinning")
NAMES = (*TIMED, "addresses", "direct-reads", "endings", "fork", "capture", "external-stream",
         "assertion", "contexts")  # fmt: skip
ON_SIM = ("addresses", "direct-reads", "endings", "fork", "capture")

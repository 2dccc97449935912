# SPDX-License-Identifier: Apache-2.0
"""python -m tests.reliability.interrupts [COUNT]: Ctrl-C at random moments of what users do.

After each the model is as it was or as it was to be, to the bit, and goes on; at the end no thread,
no file and no scratch is left.
"""

import argparse
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

LONGEST = 0.08  # seconds into an operation. Most take 1 to 100 ms, so most strikes come early


def run(count: int, seed: int = 0, progress=print) -> Counter:
    """How many interrupts struck, by operation. AssertionError at the first broken promise."""
    # A shell starts what it runs in the background with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = Path(name, "model"), Path(name, "scratch")
        folder.mkdir()
        scratch.mkdir()
        os.environ["DISTORCH_DISK"] = str(scratch)
        os.environ["XDG_CACHE_HOME"] = str(Path(name, "cache"))
        from tests.reliability.victim import Victim, check_folder, check_nothing_left, open_files

        victim, dice, struck = Victim(folder, seed), random.Random(seed), Counter()
        files = None
        while struck.total() < count:
            operation = dice.choice(Victim.OPERATIONS)
            if _interrupted(getattr(victim, operation), LONGEST * dice.random() ** 3):
                struck[operation] += 1
                if struck.total() % 50 == 0:
                    progress(f"{struck.total()} interrupts: {dict(struck)}")
            _check_one_of_both(victim, operation)
            if struck.total() == count // 4 and files is None:
                files = open_files()
        assert open_files() <= (files or 0) + 8, "open files grow"
        victim.module = None
        check_nothing_left()
        check_folder(folder, scratch)
    return struck


def _interrupted(operation, after: float) -> bool:
    """Whether Ctrl-C came while it ran."""
    main = threading.main_thread().ident
    over = threading.Event()

    def strike() -> None:
        time.sleep(after)
        if not over.is_set():
            signal.pthread_kill(main, signal.SIGINT)

    striker = threading.Thread(target=strike)
    try:
        striker.start()
        operation()
        over.set()
        striker.join()
        time.sleep(0)  # a signal that came at the last moment is delivered here
    except KeyboardInterrupt:
        over.set()
        striker.join()
        return True
    return False


def _check_one_of_both(victim, operation: str) -> None:
    """An operation that was interrupted has happened, or it has not."""
    import torch

    import distorch

    distorch.finish_merging(victim.module)
    now = victim.module(victim.x)
    states = [state for state, wanted in victim.wanted.items() if torch.equal(now, wanted)]
    assert states, f"wrong numbers after {operation}"
    allowed = {"lora" if victim.loras else ""}
    if operation in ("set_loras", "load"):  # it may have been done when the signal came
        allowed = {"", "lora"}
    assert allowed & set(states), f"{operation} left the model with {states}, not {allowed}"
    report = distorch.report(victim.module)
    on = bool(report.loras)
    assert on == (states[0] == "lora"), f"after {operation} the report says loras: {on}"
    victim.loras = [(victim.lora, 1.0)] if on else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=500, help="Ctrl-C (default 500)")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    found = run(parsed.count, parsed.seed)
    print(f"{found.total()} interrupts: {dict(found)}; nothing lost, nothing left")

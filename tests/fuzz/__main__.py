# SPDX-License-Identifier: Apache-2.0
"""python -m tests.fuzz [TARGET ...] --minutes N: runs targets under Atheris (pip install atheris).

Each target gets its share of the time, on as many processes as --jobs says. What ends with an
error that is none of distorch's, takes more than 20 seconds or more than 3 GB is written to
OUT/TARGET/found. Corpora stay in OUT/TARGET/corpus, and the next run goes on from there.
"""

import argparse
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

_LIMITS = ["-timeout=20", "-rss_limit_mb=3072", "-max_len=8192", "-print_final_stats=1"]


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all, if none is named")
    parser.add_argument("--minutes", type=float, default=10, help="in all (default 10)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a child: this target
    parser.add_argument("--seconds", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _fuzz(name: str, seconds: int, out: Path) -> None:
    """Runs one target in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["distorch"]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    folder = out / name
    for part in "corpus", "found":
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (folder / "corpus" / f"seed-{number}").write_bytes(seed)
    words = folder / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words if word))
    dictionary = [f"-dict={words}"] if target.words else []
    logging.disable()  # what the library tells of every file
    atheris.Setup(
        [sys.argv[0], *_LIMITS, f"-max_total_time={seconds}", *dictionary,
         f"-artifact_prefix={folder / 'found'}/", str(folder / "corpus")],
        target.run,
    )  # fmt: skip
    atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode())


def main() -> int:
    parsed = _parsed()
    if parsed.one:
        _fuzz(parsed.one, parsed.seconds, parsed.out)
    from tests.fuzz.targets import TARGETS

    names = parsed.targets or list(TARGETS)
    if unknown := sorted(set(names) - set(TARGETS)):
        print(f"unknown: {', '.join(unknown)}; known: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    seconds = max(1, int(parsed.minutes * 60 * parsed.jobs / len(names)))
    waiting, running, failed = list(names), {}, []
    while waiting or running:
        while waiting and len(running) < parsed.jobs:
            name = waiting.pop(0)
            (parsed.out / name).mkdir(parents=True, exist_ok=True)
            log = (parsed.out / name / "log").open("w")
            command = [sys.executable, "-m", "tests.fuzz", "--one", name, "--seconds", str(seconds),
                       "--out", str(parsed.out)]  # fmt: skip
            running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        time.sleep(0.2)
        for name in [n for n, process in running.items() if process.poll() is not None]:
            status = running.pop(name).returncode
            print(f"{name}: {_told(parsed.out / name / 'log')}", flush=True)
            if status:
                failed.append(name)
    for name in failed:
        found = sorted((parsed.out / name / "found").iterdir(), key=os.path.getmtime)
        print(f"{name} FAILED: {found[-1] if found else parsed.out / name / 'log'}")
    return 1 if failed else 0


def _told(log: Path) -> str:
    """What libFuzzer said at the end."""
    text = log.read_text(errors="replace")
    covered = re.findall(r"cov: (\d+)", text)
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", text)
    memory = re.search(r"stat::peak_rss_mb:\s*(\d+)", text)
    return (
        f"{runs[1] if runs else '?'} runs, {covered[-1] if covered else '?'} edges, "
        f"{memory[1] if memory else '?'} MB"
    )


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""python -m tests.conformance.models: every architecture, every check, every system."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import FAILS, NOT_APPLICABLE, OK, Case, run_all
from .checks import CHECKS
from .systems import SYSTEMS
from .zoo import zoo

_LIBRARIES = ("torch", "transformers", "diffusers", "peft", "accelerate")


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance.models",
        description="Runs tiny models of many architectures with their weights elsewhere and "
        "compares what people do with models, bit for bit, with the resident model.",
    )
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names, as in a shell")
    parser.add_argument("--check", metavar="NAME", action="append", choices=[*CHECKS])
    parser.add_argument(
        "--system", metavar="NAME", action="append", choices=[*SYSTEMS, "all"],
        help=f"{', '.join(SYSTEMS)} or all (default: distorch); may be repeated",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results")
    parser.add_argument(
        "--notes", metavar="FILE", type=Path,
        help="note every case as it comes; architectures that are in the file are not run again",
    )  # fmt: skip
    parser.add_argument("-j", "--jobs", type=int, default=1, help="architectures at a time")
    parser.add_argument("--list", action="store_true", help="name architectures and checks")
    return parser.parse_args(given)


def rates(cases: Sequence[Case]) -> dict[str, dict[str, dict[str, int]]]:
    """system -> check -> {"ok": .., "applicable": ..}."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for case in cases:
        counts = found.setdefault(case.system, {}).setdefault(
            case.check, {"ok": 0, "applicable": 0}
        )
        counts["ok"] += case.verdict == OK
        counts["applicable"] += case.verdict != NOT_APPLICABLE
    return found


def _share(counts: dict[str, int]) -> str:
    if not counts["applicable"]:
        return "-"
    return f"{counts['ok']}/{counts['applicable']}"


def table(cases: Sequence[Case]) -> str:
    """Checks down, systems across, in Markdown."""
    found = rates(cases)
    systems = list(found)
    checks = [c for c in CHECKS if any(c in per_check for per_check in found.values())]
    lines = [f"| check | {' | '.join(systems)} |", "|---" * (len(systems) + 1) + "|"]
    for check in checks:
        lines.append(f"| {check} | {' | '.join(_share(found[s][check]) for s in systems)} |")
    totals = [Counter[str]() for _ in systems]
    for total, system in zip(totals, systems, strict=True):
        for counts in found[system].values():
            total.update(counts)
    lines.append(f"| all | {' | '.join(_share(t) for t in totals)} |")
    share = [100 * t["ok"] / t["applicable"] if t["applicable"] else 0.0 for t in totals]
    lines.append(f"| | {' | '.join(f'{part:.1f} %' for part in share)} |")
    return "\n".join(lines)


def side_by_side(cases: Sequence[Case]) -> list[Case]:
    """The cases of the architectures that every system ran."""
    ran: dict[str, set[str]] = {}
    for case in cases:
        ran.setdefault(case.system, set()).add(case.architecture)
    common = set.intersection(*ran.values()) if ran else set()
    return [case for case in cases if case.architecture in common]


def _reasons(cases: Iterable[Case], verdict: str) -> dict[str, list[str]]:
    """ "check: reason" -> the architectures of which it is said."""
    found: dict[str, list[str]] = {}
    for case in cases:
        if case.verdict == verdict:
            names = found.setdefault(f"{case.check}: {case.reason}", [])
            if case.architecture not in names:
                names.append(case.architecture)
    return found


def results(cases: Sequence[Case]) -> dict[str, Any]:
    """What is written to the JSON file."""
    common = side_by_side(cases)
    return {
        "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "python": platform.python_version(),
        "architectures": sorted({case.architecture for case in cases}),
        "rates": rates(cases),
        "side_by_side": {
            "architectures": len({case.architecture for case in common}),
            "rates": rates(common),
        },
        "failures": {
            system: _reasons((case for case in cases if case.system == system), FAILS)
            for system in dict.fromkeys(case.system for case in cases)
        },
        "not_applicable": _reasons(cases, NOT_APPLICABLE),
    }


def _compact(found: Any, indent: str = "") -> str:
    """JSON with a line for each thing that somebody looks up."""
    inner = f"\n{indent} "
    if isinstance(found, dict) and len(indent) <= 2:
        parts = [f"{json.dumps(k)}: {_compact(v, indent + ' ')}" for k, v in found.items()]
        return f"{{{inner}{f',{inner}'.join(parts)}\n{indent}}}"
    return json.dumps(found)


def main(given: Sequence[str] | None = None) -> int:
    from tqdm import tqdm

    arguments = _arguments(given)
    models = {n: make for n, make in zoo().items() if fnmatch.fnmatch(n, arguments.only)}
    checks = arguments.check or [*CHECKS]
    if arguments.list:
        print("\n".join([*models, "", *checks]))
        return 0
    systems = arguments.system or ["distorch"]
    if "all" in systems:
        systems = [*SYSTEMS]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cases = _noted(arguments.notes)
    for name in {case.architecture for case in cases}:
        models.pop(name, None)
    with tqdm(total=len(models), disable=not sys.stderr.isatty(), unit="model") as bar:

        def done(name: str, found: list[Case]) -> None:
            bar.update()
            for case in filter(_is_ours, found):
                bar.write(f"{name} {case.check} ({case.system}): {case.reason}")
            if arguments.notes is not None:
                lines = [json.dumps(case.to_dict()) + "\n" for case in found]
                with arguments.notes.open("a") as file:
                    file.write("".join(lines))

        cases += run_all(models, checks, systems, jobs=arguments.jobs, done=done)
    if not cases:
        print(f"no architecture is called {arguments.only!r}", file=sys.stderr)
        return 2
    print(table(side_by_side(cases)))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(_compact(results(cases)) + "\n")
    return 1 if any(map(_is_ours, cases)) else 0


def _is_ours(case: Case) -> bool:
    return case.verdict == FAILS and case.system.startswith("distorch")


def _noted(file: Path | None) -> list[Case]:
    if file is None or not file.exists():
        return []
    return [Case(**json.loads(line)) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())

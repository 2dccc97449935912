# SPDX-License-Identifier: Apache-2.0
"""Runs many small cases in processes, and says what came of them."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .compare import DifferentError


@dataclass(frozen=True)
class Case:
    """One thing to check: `check(*args)` raises an error where something is not the same."""

    group: str
    name: str
    check: Callable[..., object]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Verdict:
    """What came of a case, and why it failed."""

    group: str
    name: str
    ok: bool
    reason: str = ""


def judge(case: Case) -> Verdict:
    """Runs a case; an exception is a failure."""
    try:
        case.check(*case.args)
    except DifferentError as error:
        return Verdict(case.group, case.name, False, str(error))
    except Exception as error:
        return Verdict(case.group, case.name, False, f"{type(error).__name__}: {error}")
    return Verdict(case.group, case.name, True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every sweep can be told."""
    parser.add_argument("--only", default="*", help="names that match this pattern (default: all)")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--json", type=Path, help="write every exception and the rates here")


def _one_thread() -> None:
    torch.set_num_threads(1)


def run_cases(title: str, cases: Sequence[Case], options: argparse.Namespace) -> int:
    """Judges all cases and prints rates and exceptions. 0 if none failed, else 1."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        options.jobs, mp_context=context, initializer=_one_thread
    )
    with pool:
        waiting = [pool.submit(judge, case) for case in cases]
        done = concurrent.futures.as_completed(waiting)
        verdicts = [
            future.result()
            for future in tqdm(done, total=len(waiting), disable=not sys.stderr.isatty())
        ]
    rates = {}
    for group in dict.fromkeys(case.group for case in cases):
        found = [verdict.ok for verdict in verdicts if verdict.group == group]
        rates[group] = {"ok": sum(found), "of": len(found)}
        share = 100 * sum(found) / len(found)
        print(f"{title} {group:10} {sum(found)} of {len(found)} ({share:.2f} %)")
    failed = sorted((v.group, v.name, v.reason) for v in verdicts if not v.ok)
    for group, name, reason in failed:
        print(f"  {group:10} {name}: {reason.splitlines()[0] if reason else ''}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"torch": torch.__version__, "rates": rates, "exceptions": failed}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(failed))

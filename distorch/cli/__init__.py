# SPDX-License-Identifier: Apache-2.0
"""The command line: distorch inspect | plan | verify | trace | doctor | calibrate | demo.

Exit status: 0 done, 1 what was asked failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from distorch import __version__
from distorch.cli import plan
from distorch.cli.output import PLOT, show
from distorch.errors import DistorchError, SpecError, printable


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distorch", description="Run PyTorch models whose weights do not fit."
    )
    parser.add_argument("--version", action="version", version=f"distorch {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="what is in a checkpoint or LoRA file")
    inspect.add_argument("file", help="safetensors, GGUF or torch file, index, or folder")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument(
        "--fits",
        metavar="CHECKPOINT",
        help="how much of a LoRA fits that file; exits with 1 if nothing does",
    )

    plan.add_command(commands)

    verify = commands.add_parser(
        "verify",
        help="whether a checkpoint's bytes are what they were",
        description="Reads a checkpoint whole, and compares it with the checksums that were taken "
        "when it was verified first, by this command or by load(verify=True). The first time, it "
        "takes them. Exit status 1 if bytes have changed.",
    )
    verify.add_argument("file", help="safetensors, GGUF or torch file, index, or folder")
    verify.add_argument(
        "--anew", action="store_true", help="take new checksums: the file is right as it is now"
    )
    verify.add_argument("--json", action="store_true", help="print JSON")

    trace = commands.add_parser("trace", help="what ran when, from a file that a trace wrote")
    trace.add_argument("file", help="the JSON file that distorch.trace wrote")
    trace.add_argument("--json", action="store_true", help="print JSON")
    trace.add_argument("--plot", metavar="PICTURE", help=PLOT)

    doctor = commands.add_parser(
        "doctor",
        help="devices, memory, versions, and what is wrong",
        description="Looks at this machine, runs a small weight through every donor, and says what "
        "to do about whatever fails. Exit status 1 if something does.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")

    calibrate = commands.add_parser(
        "calibrate",
        help="measure the links between devices",
        description="Measures what each link carries, alone and with the others, and remembers it: "
        "stripes ('cpu+cuda:1') are cut by it. Takes seconds.",
    )
    calibrate.add_argument("--json", action="store_true", help="print JSON")

    demo = commands.add_parser("demo", help="digits from a model with most weights on donors")
    demo.add_argument("--out", type=Path, default=Path("digits.png"), metavar="PNG")
    demo.add_argument("--spec", help="another placement, for example 'cpu,0b;disk,*'")
    demo.add_argument("--count", type=int, default=50, help="digits per sheet (default 50)")
    demo.add_argument("--steps", type=int, default=24, help="sampling steps (default 24)")
    return parser


def _inspect(arguments: argparse.Namespace) -> int:
    from distorch.cli.inspect import inspect_file

    facts = inspect_file(arguments.file, arguments.fits)
    print(json.dumps(facts.to_dict(), indent=1) if arguments.json else facts)
    return 1 if facts.fits is not None and facts.fits["targets"] == 0 else 0


def _verify(arguments: argparse.Namespace) -> int:
    from distorch.display.tables import human_bytes, text_table
    from distorch.formats.verify import compare_whole, forget

    if arguments.anew:
        forget(arguments.file)
    known = compare_whole(arguments.file)
    sizes = {path: path.stat().st_size for path in known}
    if arguments.json:
        files = [{"file": str(p), "bytes": sizes[p], "known": known[p]} for p in known]
        print(json.dumps({"files": files}, indent=1))
        return 0
    said = {True: "as it was", False: "seen first: its checksums are kept"}
    rows = [(str(path), human_bytes(sizes[path]), said[known[path]]) for path in known]
    print(text_table(("file", "size", "its bytes"), rows, "verified"))
    return 0


def _trace(arguments: argparse.Namespace) -> int:
    from distorch.timeline import Timeline

    return show(Timeline.load(arguments.file), arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from distorch.cli.doctor import examine

    findings = examine()
    print(json.dumps(findings.to_dict(), indent=1) if arguments.json else findings)
    return 0 if findings.ok else 1


def _calibrate(arguments: argparse.Namespace) -> int:
    from distorch.machine.links import calibrate

    found = calibrate()
    print(json.dumps(found.to_dict(), indent=1) if arguments.json else found)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from distorch.demo.run import run_demo

    if arguments.count < 1 or arguments.steps < 1:
        raise SpecError("--count and --steps: expected 1 or more")
    same = run_demo(
        arguments.out, spec=arguments.spec, count=arguments.count, steps=arguments.steps
    )
    return 0 if same else 1


_COMMANDS = {
    "inspect": _inspect,
    "plan": plan.run,
    "verify": _verify,
    "trace": _trace,
    "doctor": _doctor,
    "calibrate": _calibrate,
    "demo": _demo,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parsed = _parser().parse_args(plan.with_file(sys.argv[1:] if arguments is None else arguments))
    with warnings.catch_warnings():
        warnings.showwarning = _told  # type: ignore[assignment]
        return _run(parsed)


def _told(message: Warning | str, *_: object) -> None:
    """A warning, without the line of code that it came from."""
    _complain(str(message))


def _complain(text: str) -> None:
    """A message, without what names from a file could do to a terminal."""
    print("distorch: " + "\n".join(map(printable, text.splitlines())), file=sys.stderr)


def _run(parsed: argparse.Namespace) -> int:
    try:
        return _COMMANDS[parsed.command](parsed)
    except SpecError as error:
        _complain(str(error))
        return 2
    except (DistorchError, OSError, ImportError) as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 1

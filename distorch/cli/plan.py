# SPDX-License-Identifier: Apache-2.0
"""distorch plan: where weights would go, and what a step of a well-known model would take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distorch.cli.output import PLOT, show
from distorch.display.tables import human_bytes
from distorch.errors import SpecError

if TYPE_CHECKING:
    from distorch.machine.profiles import Machine
    from distorch.prediction import Prediction


def add_command(commands: Any) -> None:
    """The command and its arguments; `commands` are the subparsers of argparse."""
    plan = commands.add_parser(
        "plan",
        help="where the weights of a file or a well-known model would go; nothing moves",
        usage="%(prog)s FILE SPEC [options]\n"
        "       %(prog)s --model MODEL SPEC [--machine MACHINE] [options]",
        allow_abbrev=False,
    )
    plan.add_argument(
        "file", metavar="FILE",
        help="safetensors, GGUF or torch file, index, or folder; none with --model",
    )  # fmt: skip
    plan.add_argument(
        "spec", metavar="SPEC",
        help="devices with what each may hold, such as 'cuda:0,2.5gb;cpu,*'; * is the rest",
    )  # fmt: skip
    plan.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    plan.add_argument("--plot", metavar="PICTURE", help=PLOT)
    plan.add_argument(
        "--order", default="interleaved", choices=["interleaved", "sequential", "optimal"],
        help="spread the weights of each device over the model (default), keep them together, or "
        "find the shortest step (needs --step or --model)",
    )  # fmt: skip
    plan.add_argument(
        "--step", metavar="JSON", help="a step of the model, which Step.save wrote: for optimal"
    )
    plan.add_argument(
        "--min-bytes", default="1mb", metavar="BYTES",
        help="smaller weights stay where the model computes; 0, 64kb or auto (default 1mb)",
    )  # fmt: skip

    plan.add_argument(
        "--machine", metavar="NAME",
        help="another machine than this one, such as rtx3090-pcie4x16-64gb-nvme4 (GPU, its link, "
        "RAM, disk; from data sheets), or a JSON file that distorch.Machine.save wrote",
    )  # fmt: skip
    known = plan.add_argument_group("well-known models, of which nothing is downloaded")
    known.add_argument(
        "--model", metavar="NAME",
        help="flux-dev, qwen-image, wan22-14b or llama-70b, in bfloat16: also says how long a step "
        "takes on --machine, or on this one after calibrate",
    )  # fmt: skip
    known.add_argument(
        "--size",
        metavar="WxH",
        help="of the picture in pixels (default 1024x1024; of a video 832x480)",
    )
    known.add_argument("--frames", type=int, metavar="N", help="of a video (default 81)")
    known.add_argument(
        "--tokens", type=int, metavar="N",
        help="of the text (default 512; Qwen-Image 256), or new ones of a language model (1)",
    )  # fmt: skip
    known.add_argument(
        "--batch", type=int, metavar="N",
        help="how many at once (default 1); 2 for guidance with a negative prompt",
    )  # fmt: skip
    known.add_argument(
        "--curve", action="store_true", help="also say what more or less memory would be worth"
    )


def with_file(arguments: Sequence[str]) -> list[str]:
    """argparse has no positional argument that another one replaces: with --model, FILE is ""."""
    given = list(arguments)
    if given[:1] == ["plan"] and any(a == "--model" or a.startswith("--model=") for a in given):
        given.insert(1, "")
    return given


def run(arguments: argparse.Namespace) -> int:
    from distorch.loading import plan
    from distorch.step import Step

    if arguments.model is not None:
        return _plan_of_model(arguments)
    for name in "size", "frames", "tokens", "batch", "curve":
        if getattr(arguments, name):
            raise SpecError(f"--{name} goes with --model; of a file no step is known")
    if arguments.step is not None and arguments.order != "optimal":
        raise SpecError("--step goes with --order optimal; distorch.predict says what it takes")
    made = plan(
        arguments.file, arguments.spec, order=arguments.order, min_bytes=arguments.min_bytes,
        step=None if arguments.step is None else Step.load(arguments.step),
        machine=arguments.machine,
    )  # fmt: skip
    return show(made, arguments)


def _plan_of_model(arguments: argparse.Namespace) -> int:
    from distorch.machine.profiles import Machine, machine_of
    from distorch.planner import parse_spec
    from distorch.prediction import curve, predict
    from distorch.shapes import estimated, model_named, shape_named

    if arguments.step is not None:
        raise SpecError("--step goes with a file; the step of --model is estimated")
    parse_spec(arguments.spec)  # what is wrong with it is said at once
    name = arguments.model.lower()
    shape = shape_named(name)
    request = shape.usual.with_given(
        size=_size(arguments.size), frames=arguments.frames, tokens=arguments.tokens,
        batch=arguments.batch,
    )  # fmt: skip
    machine = machine_of(arguments.machine) or Machine.here()
    model = model_named(name)
    step = estimated(model, request, machine)
    options = {"order": arguments.order, "min_bytes": arguments.min_bytes, "machine": machine}
    found = predict(model, step, arguments.spec, **options)
    if arguments.plot:
        found.plan.plot(arguments.plot)
    worth = curve(model, step, arguments.spec, **options) if arguments.curve else None
    if arguments.json:
        told = {
            "request": asdict(request),
            "machine": machine.to_dict(),
            "plan": found.plan.to_dict(),
            "prediction": found.to_dict(),
        }
        if worth is not None:
            told["curve"] = worth.to_dict()
        print(json.dumps(told, indent=1))
        return 0
    print(f"{shape.says}.\n{request}\n\n{found.plan}\n{_on_card(found, machine)}\n\n{found}")
    if worth is not None:
        print(f"\n{worth}")
    is_file = isinstance(arguments.machine, str) and arguments.machine.endswith(".json")
    rates = "calibrate" if arguments.machine is None else "that file" if is_file else "data sheets"
    print(f"\nestimated: operators from their shapes, links and speeds from {rates}")
    if arguments.plot:
        print(f"picture: {arguments.plot}")
    return 0


def _size(given: str | None) -> tuple[int, int] | None:
    if given is None:
        return None
    width, times, height = given.lower().partition("x")
    if not (times and width.isdecimal() and height.isdecimal()):
        raise SpecError(f"--size {given}: expected a width and a height, as 1024x1024")
    return int(width), int(height)


def _on_card(found: Prediction, machine: Machine) -> str:
    """What weights take on the device that computes, and what they leave to activations."""
    compute = found.plan.compute
    weights, whole = found.plan.bytes[compute], machine.devices[compute]
    left = whole - weights - found.ring_bytes
    said = (
        f"on {compute}: {human_bytes(weights)} of weights and {human_bytes(found.ring_bytes)} of "
        f"look-ahead, of {human_bytes(whole)}; "
    )
    if left < 0:
        return f"{said}this does not fit: give {compute} {human_bytes(-left)} less"
    return f"{said}{human_bytes(left)} are left for activations and other programs"

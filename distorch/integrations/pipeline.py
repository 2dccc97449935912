"""load_pipeline: pipelines of diffusers, each part streamed, one budget for all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from distorch import api
from distorch._progress import Progress, check_progress, progress_of
from distorch.errors import FormatError, PlacementError, SpecError, warn_at_caller
from distorch.formats.naming import ConversionError
from distorch.integrations.budget import plan_together
from distorch.integrations.hub import check_model
from distorch.integrations.lora_parts import LoraSplitter, PartLoras, PipelineLora
from distorch.integrations.pretrained import dtype_for
from distorch.integrations.refusals import refuse_other_offloading
from distorch.integrations.source import Part, Source
from distorch.integrations.weights import floating_dtype, opened
from distorch.loading.loader import fill
from distorch.loading.prepare import FillOptions, Matched, Request, match_up
from distorch.patching import set_loras
from distorch.planner import Inventory, Plan
from distorch.runtime import distribution
from distorch.runtime.options import Options, PlacementOptions, check_one_placement

_LOG = logging.getLogger("distorch")
_KEY = "_distorch"
Dtypes = torch.dtype | str | Mapping[str, torch.dtype | str]


@dataclass
class PipelineState:
    """What a distributed pipeline remembers: the common plan, and LoRA files that were read."""

    plan: Plan
    splitter: LoraSplitter
    options: Options
    loras: PartLoras = field(default_factory=dict)


def load_pipeline(
    model: str,
    spec: str | None = None,
    *,
    dtype: Dtypes = "auto",
    loras: Sequence[PipelineLora] = (),
    files: Mapping[str, str] | None = None,
    config: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cls: Any = None,
    components: Mapping[str, Any] | None = None,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    progress: Progress = None,
    **options: Unpack[FillOptions],
) -> Any:
    """A pipeline of diffusers whose transformers, text encoders and VAE are streamed from their
    files, each weight straight to its place.

    `model` is a folder, an id of the hub, or one file with the whole pipeline (an original Stable
    Diffusion checkpoint; `config` is then the folder or id with its configuration). An id is looked
    up in the local cache, and downloaded only if it is not there. `spec` is one budget for all
    parts, such as "cuda:0,6gb;cpu,*": what runs at every step gets the fast places first. "auto"
    (or none) keeps as much on the compute device as its free memory allows.

    `dtype`: "auto" is what the largest part's file has; or one by part, {"vae": torch.float32,
    "default": torch.bfloat16}. `files` takes the weights of a part from another file:
    {"transformer": "flux1-dev-Q8_0.gguf"}. `loras` are (file or state dict, strength) pairs; keys
    go to the parts that they name, those that name none to the main part, and (file, strength,
    "transformer_2") sends a whole file to one. `cls` is a pipeline class, `components` go to it as
    they are: {"safety_checker": None}. Names in `keep`, `offload` and `rules` begin with the part:
    "text_encoder.*". `min_bytes` is "auto" unless given; other options are those of
    `distorch.load`.

    The pipeline gives the bits of `DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)`.
    Its `enable_model_cpu_offload` and the like raise, and say what to do.
    Raises SpecError, FormatError, PlacementError; then nothing is left behind.
    """
    check_progress(progress)
    spec = "auto" if spec is None and virtual_vram is None else spec
    check_one_placement(spec, None, virtual_vram, donor)
    placing: dict[str, Any] = {"min_bytes": "auto", **options}
    filling = {name: placing.pop(name) for name in _OF_FILLING if name in placing}
    opts = Options.of(placing, ("spec", "files", "components", *_OF_FILLING))
    source = Source.of(
        check_model(model), config=config, variant=variant, revision=revision, pipeline=cls,
        components=components or {}, files=files or {},
    )  # fmt: skip
    parts = source.parts()
    dtypes = _dtypes(dtype, parts)
    given = {name: part for name, part in source.components.items() if isinstance(part, nn.Module)}
    splitter = LoraSplitter([*parts, *given])
    shares = splitter.split(loras, filling.get("strict_loras", True))
    modules, matched = dict(given), dict[str, Matched]()
    for name, part in parts.items():
        request = Request(
            placing=placing, loras=shares[name], strict=False, dtype="module", **filling
        )
        modules[name], found = _matched(part, dtypes[name], request)
        if found is not None:
            matched[name] = found
    inventories = {
        name: matched[name].inventory if name in matched else _inventory_of(module)
        for name, module in modules.items()
    }
    plan, own = plan_together(
        inventories, spec, opts, distribution.devices_for((), None),
        virtual_vram=virtual_vram, donor=donor,
    )  # fmt: skip
    if problem := plan.over_budget():
        warn_at_caller(problem)
    total = sum(job.stored.nbytes for each in matched.values() for job in each.jobs)
    with progress_of(progress, total, "loading") as done:
        for name, found in matched.items():
            mine = replace(opts, min_bytes=0).as_planned(own[name])
            fill(modules[name], found.placed(own[name], mine), progress=done)
    for name in modules.keys() - matched.keys():
        api.distribute(modules[name], plan=own[name], prefetch=opts.prefetch, progress=progress)
        if shares[name]:
            set_loras(modules[name], shares[name], progress=progress, **_of_loras(filling))
    pipe = source.pipeline(modules, _as_diffusers(dtypes))
    pipe.__dict__[_KEY] = PipelineState(plan, splitter, opts, shares)
    return refuse_other_offloading(pipe)


_OF_FILLING = ("strict_loras", "lora_mode", "patched_dtype", "resident")


def _of_loras(filling: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in filling.items() if name != "resident"}


def _matched(part: Part, dtype: torch.dtype, request: Request) -> tuple[nn.Module, Matched | None]:
    """A part's empty module and what its file has for it; or the module whole, as its library loads
    it. FormatError.
    """
    for number, file in enumerate(part.weights, start=1):
        try:
            module = part.empty(dtype, file)
            return module, match_up(module, file, request)
        except ConversionError as error:
            _LOG.warning("%s is loaded whole, then it is distributed: %s", part.name, error)
            return part.whole(dtype), None
        except FormatError as error:
            if number < len(part.weights):
                continue
            if part.shares_a_file:  # in a form that only diffusers knows
                return part.whole(dtype), None
            raise FormatError(f"{part.name}: {error}") from error
    raise AssertionError("a part has a file")


def _dtypes(asked: Dtypes, parts: Mapping[str, Part]) -> dict[str, torch.dtype]:
    """Part -> dtype. SpecError."""
    if isinstance(asked, Mapping):
        if unknown := [name for name in asked if name not in (*parts, "default")]:
            raise SpecError(
                f"dtype={{{unknown[0]!r}: ...}}: there is no such part; expected 'default' or "
                f"{', '.join(parts)}"
            )
        rest = asked.get("default", torch.float32)
        return {name: _floating(asked.get(name, rest)) for name in parts}
    if asked != "auto":
        return dict.fromkeys(parts, _floating(asked))
    headers = [opened(part.weights[0]) for part in parts.values()]
    largest = max(headers, key=lambda checkpoint: checkpoint.total_bytes)
    return dict.fromkeys(parts, floating_dtype(largest))


def _floating(asked: torch.dtype | str) -> torch.dtype:
    return dtype_for(asked, None, Path())


def _as_diffusers(dtypes: Mapping[str, torch.dtype]) -> Any:
    """One dtype for what diffusers loads itself, or a table where parts differ."""
    different = set(dtypes.values())
    return different.pop() if len(different) == 1 else dict(dtypes)


def _inventory_of(module: nn.Module) -> Inventory:
    return distribution.inventory_of(module, distribution.group_members(module))


def distribute_pipeline(
    pipe: Any,
    spec: str | None = None,
    *,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    progress: Progress = None,
    **options: Unpack[PlacementOptions],
) -> Any:
    """Places the models of a pipeline that exists, or places them anew; returns the pipeline.

    `spec` is one budget for all parts, and options are those of `distorch.distribute`, both as in
    `load_pipeline`. Options that are not given stay as they were.
    Raises SpecError, PlacementError; every part is then as it was, or placed as the new plan says.
    """
    check_progress(progress)
    modules = models_of(pipe)
    before = pipe.__dict__.get(_KEY)
    spec = "auto" if spec is None and virtual_vram is None else spec
    check_one_placement(spec, None, virtual_vram, donor)
    known = before.options if before is not None else Options(min_bytes="auto")
    opts = Options.of(options, ("spec", "virtual_vram", "donor", "progress"), known)
    groups = [g for module in modules.values() for g in distribution.group_members(module)]
    devices = distribution.devices_for(groups, nn.ModuleList(modules.values()))
    inventories = {name: _inventory_of(module) for name, module in modules.items()}
    plan, own = plan_together(
        inventories, spec, opts, devices, virtual_vram=virtual_vram, donor=donor
    )
    if problem := plan.over_budget():
        warn_at_caller(problem)
    for name, module in modules.items():
        api.distribute(module, plan=own[name], prefetch=opts.prefetch, progress=progress)
    if before is None:
        before = PipelineState(plan, LoraSplitter(modules), opts)
    pipe.__dict__[_KEY] = replace(before, plan=plan, options=opts)
    return refuse_other_offloading(pipe)


def state_of(pipe: Any) -> PipelineState:
    """What is known of a distributed pipeline. SpecError, PlacementError."""
    models_of(pipe)
    state = pipe.__dict__.get(_KEY)
    if not isinstance(state, PipelineState):
        raise PlacementError(
            f"this {type(pipe).__name__} is not distributed: load it with load_pipeline, or call "
            "distribute_pipeline(pipe, spec)"
        )
    return state


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """Part -> module, each once. SpecError if it is no pipeline."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise SpecError(
            f"expected a pipeline of diffusers, got {type(pipe).__name__}; of a module, call "
            "distorch.distribute(module, spec)"
        )
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, part in components.items():
        if isinstance(part, nn.Module):
            found.setdefault(id(part), (name, part))
    if not found:
        raise SpecError(f"this {type(pipe).__name__} has no models")
    return dict(found.values())


def set_pipeline_loras(
    pipe: Any,
    loras: Sequence[PipelineLora],
    *,
    strict_loras: bool = True,
    progress: Progress = None,
    **options: Any,
) -> Any:
    """Puts these LoRAs, and no others, on the parts of a distributed pipeline; returns it.

    `loras` are as in `load_pipeline`, options those of `distorch.set_loras`. An error leaves all
    parts with the LoRAs that they had.
    """
    state, modules = state_of(pipe), models_of(pipe)
    shares = state.splitter.split(loras, strict_loras)
    undo: list[tuple[nn.Module, list[tuple[Any, float]]]] = []
    try:
        for name, mine in shares.items():
            before = state.loras.get(name, [])
            if mine or before:
                set_loras(
                    modules[name], mine, strict_loras=strict_loras, progress=progress, **options
                )
                undo.append((modules[name], before))
    except BaseException:
        for module, before in undo:
            set_loras(module, before, strict_loras=False, progress=False)
        raise
    state.loras = shares
    return pipe

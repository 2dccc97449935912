# SPDX-License-Identifier: Apache-2.0
"""load_pipeline: pipelines of diffusers, each part streamed, one budget for all."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from distorch import api
from distorch.display.progress import Progress, check_progress, progress_of
from distorch.errors import FormatError, PlacementError, SpecError, warn_at_caller
from distorch.formats.checkpoint import open_checkpoint
from distorch.integrations.budget import plan_together
from distorch.integrations.hub import check_model
from distorch.integrations.lora_parts import LoraSplitter, PartLoras, PipelineLora
from distorch.integrations.pretrained import checked_dtype
from distorch.integrations.refusals import allow_other_offloading, refuse_other_offloading
from distorch.integrations.source import Part, Source
from distorch.integrations.weights import floating_dtype
from distorch.loading.loader import fill
from distorch.loading.prepare import FillOptions, Matched, Request, match_up
from distorch.patching import LoraMode, set_loras
from distorch.planner import DeviceInfo, Inventory, Plan
from distorch.reporting import bytes_of
from distorch.runtime import distribution, placing, planning
from distorch.runtime.groups import group_members
from distorch.runtime.options import Options, PlacementOptions, check_one_placement

_LOG = logging.getLogger("distorch")
_KEY = "_distorch"
_ARGUMENTS = (
    "spec", "dtype", "loras", "files", "config", "variant", "revision", "cls", "components",
    "virtual_vram", "donor", "progress", *FillOptions.__annotations__,
)  # fmt: skip
Dtypes = torch.dtype | str | Mapping[str, torch.dtype | str]


@dataclass
class PipelineState:
    """What a distributed pipeline remembers: the common plan, and LoRA files that were read."""

    plan: Plan
    splitter: LoraSplitter
    options: Options


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
    """Loads a pipeline of diffusers: each part is streamed from its files straight to its place.

    Example::

        pipe = load_pipeline("black-forest-labs/FLUX.1-dev", "cuda:0,6gb;cpu,*")

    The pipeline gives the bits of `DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)`.
    Its `enable_model_cpu_offload` and the like raise, and say what to do.

    Args:
        model: A folder, an id of the hub, or one file with the whole pipeline (an original Stable
            Diffusion checkpoint). An id is looked up in the local cache, and downloaded only if it
            is not there.
        spec: One budget for all parts. What runs at every step gets the fast places first. If not
            given, or "auto": as much on the compute device as its free memory allows.
        dtype: "auto" is what the largest part's file has. Or a dtype, or one by part:
            {"vae": torch.float32, "default": torch.bfloat16} (without a default: float32).
        loras: Pairs of a LoRA (a file or a state dict) and its strength. Keys go to the parts that
            they name, those that name none to the main part. A triple (file, strength,
            "transformer_2") sends a whole file to one part.
        files: Takes the weights of a part from another file:
            {"transformer": "flux1-dev-Q8_0.gguf"}.
        config: The folder or id with the configuration of a `model` that is one file.
        variant: A kind of files, such as "fp16".
        revision: A branch, tag or commit of the hub.
        cls: A pipeline class, or its name.
        components: Go to the pipeline as they are: {"safety_checker": None}.
        virtual_vram: Bytes to give away, in place of a spec.
        donor: Where the bytes of `virtual_vram` go.
        progress: As in `distorch.distribute`.
        options: `lora_mode`, `strict_loras`, `patched_dtype`, `resident`, `verify` as in
            `distorch.load`; `compute`, `order`, `keep`, `offload`, `rules`, `prefetch`, `min_bytes`
            as in `distorch.distribute`. `min_bytes` is "auto" here: small weights leave, too, if
            the spec asks for it. Names begin with the part: `keep=["vae.*"]`.

    Returns:
        The pipeline, an object of diffusers' own class.

    Raises:
        SpecError: The spec or an option is wrong.
        FormatError: A file is missing, damaged, or does not fit its part.
        PlacementError: The placement cannot be done.
        FetchError: A file could not be read, or a donor failed.

    After any of them nothing is left behind.
    """
    check_progress(progress)
    wish = Request.for_new_module(spec, virtual_vram, donor, options, _ARGUMENTS)
    opts = wish.check()
    source = Source.of(
        check_model(model), config=config, variant=variant, revision=revision, pipeline=cls,
        components=components or {}, files=files or {},
    )  # fmt: skip
    parts = source.parts()
    dtypes = _dtypes(dtype, parts)
    made = [name for name, part in source.components.items() if isinstance(part, nn.Module)]
    splitter = LoraSplitter([*parts, *made])
    shares = splitter.split(loras, wish.strict_loras)
    modules: dict[str, nn.Module] = {}
    matched: dict[str, Matched] = {}
    for name, part in parts.items():
        request = replace(wish, loras=shares[name])
        modules[name], found = _matched(part, dtypes[name], request, progress)
        if found is not None:
            matched[name] = found
    pipe = source.pipeline(modules, _as_diffusers(dtypes, dtype))
    # Also those that the user gave, and those that diffusers has loaded itself.
    modules |= {name: module for name, module in models_of(pipe).items() if name not in modules}
    whole = {name: module for name, module in modules.items() if name not in matched}
    inventories = {
        name: matched[name].inventory if name in matched else _inventory_of(module)
        for name, module in modules.items()
    }
    plan, own = plan_together(
        inventories, spec, opts, _devices_for(whole), virtual_vram=virtual_vram, donor=donor
    )
    if problem := plan.over_budget():
        warn_at_caller(problem)
    total = sum(job.stored.nbytes for each in matched.values() for job in each.jobs)
    with progress_of(progress, total, "loading") as done, _all_or_nothing(whole) as placed:
        for name, found in matched.items():
            ready = found.placed(own[name], opts.as_planned(own[name]))
            fill(modules[name], ready, progress=done)
        for name, module in whole.items():
            placed.append(name)
            api.distribute(module, plan=own[name], prefetch=opts.prefetch, progress=progress)
        _put_loras(
            {name: modules[name] for name in whole if shares.get(name)}, shares,
            strict_loras=wish.strict_loras, lora_mode=wish.lora_mode,
            patched_dtype=wish.patched_dtype, progress=progress,
        )  # fmt: skip
    pipe.__dict__[_KEY] = PipelineState(plan, splitter, opts)
    return refuse_other_offloading(pipe)


def _matched(
    part: Part, dtype: torch.dtype, request: Request, progress: Progress
) -> tuple[nn.Module, Matched | None]:
    """A part's empty module, matched with its file. If the file cannot be streamed: the module with
    its weights, as its library loads it, and None. FormatError.
    """
    try:
        with request.verifying(part.weights, progress):
            module, checkpoint = part.empty(dtype)
            return module, match_up(module, checkpoint, request)
    except FormatError as error:
        if not part.library_can_load(error):
            raise FormatError(f"{part.name}: {error}") from error
        _LOG.warning("%s is loaded whole, then it is distributed: %s", part.name, error)
        request.compare(part.weights, progress)
        return part.whole(dtype), None


def _dtypes(asked: Dtypes, parts: Mapping[str, Part]) -> dict[str, torch.dtype]:
    """Part -> dtype. SpecError."""
    if not isinstance(asked, Mapping):
        asked = {"default": asked}
    if unknown := [name for name in asked if name not in (*parts, "default")]:
        raise SpecError(
            f"dtype={{{unknown[0]!r}: ...}}: there is no such part; expected 'default' or "
            f"{', '.join(parts)}"
        )
    wanted = {name: asked.get(name, asked.get("default", torch.float32)) for name in parts}
    auto = _dtype_of_the_largest(parts) if "auto" in wanted.values() else torch.float32
    return {name: auto if d == "auto" else checked_dtype(d) for name, d in wanted.items()}


def _dtype_of_the_largest(parts: Mapping[str, Part]) -> torch.dtype:
    headers = [open_checkpoint(part.weights) for part in parts.values()]
    return floating_dtype(max(headers, key=lambda checkpoint: checkpoint.total_bytes))


def _as_diffusers(dtypes: Mapping[str, torch.dtype], asked: Dtypes) -> Any:
    """The dtype of the parts that diffusers loads itself, as `from_pretrained` takes it."""
    if not isinstance(asked, Mapping):
        return next(iter(dtypes.values()), torch.float32)
    rest = asked.get("default", torch.float32)
    return {**dtypes, **({} if rest == "auto" else {"default": checked_dtype(rest)})}


def _devices_for(modules: Mapping[str, nn.Module]) -> dict[str, DeviceInfo]:
    """The machine's devices; memory that these modules hold now counts as free for them."""
    groups = [g for module in modules.values() for g in group_members(module)]
    return planning.devices_for(groups, nn.ModuleList(modules.values()))


@contextmanager
def _all_or_nothing(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Gives a list for the names of modules that are about to be placed. After an error, these
    modules are put back where they were.
    """
    plans: dict[str, Plan | None] = dict.fromkeys(modules)
    for name, module in modules.items():
        if distribution.is_distributed(module):
            plans[name] = distribution.distribution_of(module).plan
    first = {name: next(module.parameters(), None) for name, module in modules.items()}
    devices = {name: None if p is None else p.device for name, p in first.items()}
    placed: list[str] = []
    try:
        yield placed
    except BaseException:
        for name in reversed(placed):
            module, plan = modules[name], plans[name]
            try:
                if plan is not None:
                    api.distribute(module, plan=plan, progress=False)
                elif distribution.is_distributed(module):
                    api.undistribute(module, devices[name])
            except Exception as error:  # the first one is raised, and the others go on
                _LOG.error("%s could not be put back: %s", name, error)
        raise


def _inventory_of(module: nn.Module) -> Inventory:
    return distribution.inventory_now(module, group_members(module))


def distribute_pipeline(
    pipe: Any,
    spec: str | None = None,
    *,
    virtual_vram: str | int | None = None,
    donor: str | None = None,
    progress: Progress = None,
    **options: Unpack[PlacementOptions],
) -> Any:
    """Places the models of a pipeline that exists, or places them anew.

    Args:
        pipe: A pipeline of diffusers.
        spec: One budget for all parts, such as "cuda:0,4gb;cpu,*". Give this or `virtual_vram`.
        virtual_vram: Bytes to give away, in place of a spec.
        donor: Where the bytes of `virtual_vram` go.
        progress: As in `distorch.distribute`.
        options: `keep`, `offload`, `rules`, `order`, `min_bytes`, `prefetch`, `compute` as in
            `load_pipeline`. Those that are not given stay as they were.

    Returns:
        The pipeline itself.

    Raises:
        SpecError: The spec or an option is wrong.
        PlacementError: The placement cannot be done, or another library moves the weights already.
        FetchError: A donor failed.

    After any of them each part is as it was.
    """
    check_progress(progress)
    modules = models_of(pipe)
    state = pipe.__dict__.get(_KEY)
    check_one_placement(spec, None, virtual_vram, donor)
    _check_not_offloaded(pipe, modules)
    known = _lasting_options(state, modules)
    opts = Options.of(options, ("spec", "virtual_vram", "donor", "progress"), known)
    inventories = {name: _inventory_of(module) for name, module in modules.items()}
    devices = _devices_for(modules)
    plan, own = plan_together(
        inventories, spec, opts, devices, virtual_vram=virtual_vram, donor=donor
    )
    if problem := plan.over_budget():
        warn_at_caller(problem)

    def growth(name: str) -> int:
        held = bytes_of(modules[name]).get(plan.compute, 0)
        return own[name].bytes[plan.compute] - held

    with _all_or_nothing(modules) as placed:
        # Those that leave the compute device make room for those that come.
        for name in sorted(modules, key=growth):
            placed.append(name)
            api.distribute(modules[name], plan=own[name], prefetch=opts.prefetch, progress=progress)
    splitter = LoraSplitter(modules) if state is None else state.splitter
    pipe.__dict__[_KEY] = PipelineState(plan, splitter, opts)
    return refuse_other_offloading(pipe)


def undistribute_pipeline(pipe: Any, device: str | torch.device | None = None) -> Any:
    """Makes a distributed pipeline a plain one again.

    Args:
        pipe: A pipeline with distributed models.
        device: Where their weights go. If not given: their compute device.

    Returns:
        The pipeline itself.

    Raises:
        SpecError: `device` is no device that computes.
        PlacementError: None of its models is distributed.
        FetchError: A donor failed.

    After any of them each part is as it was.
    """
    state_of(pipe)
    modules = {n: m for n, m in models_of(pipe).items() if distribution.is_distributed(m)}
    with _all_or_nothing(modules) as placed:
        for name, module in modules.items():
            placed.append(name)
            api.undistribute(module, device)
    pipe.__dict__.pop(_KEY, None)
    return allow_other_offloading(pipe)


def _check_not_offloaded(pipe: Any, modules: Mapping[str, nn.Module]) -> None:
    """PlacementError if accelerate moves the weights already."""
    for name, module in modules.items():
        if placing.accelerate_moves(module):
            raise PlacementError(
                f"accelerate offloads this {type(pipe).__name__} ({name}), by "
                "enable_model_cpu_offload(), enable_sequential_cpu_offload() or device_map=. Call "
                "pipe.remove_all_hooks() first, or load the pipeline with load_pipeline"
            )


def _lasting_options(state: PipelineState | None, modules: Mapping[str, nn.Module]) -> Options:
    """The options that hold until others are given: it goes on computing where it does."""
    parts = [m for m in modules.values() if distribution.is_distributed(m)]
    computes = [distribution.distribution_of(m).lasting_options().compute for m in parts]
    compute = next((device for device in computes if device is not None), None)
    known = Options(min_bytes="auto") if state is None else state.options
    return replace(known, compute=compute)


def state_of(pipe: Any) -> PipelineState:
    """What is known of a distributed pipeline. If its models were distributed one by one, or belong
    to another pipeline too, it is put together from what they know. SpecError, PlacementError.
    """
    state = pipe.__dict__.get(_KEY)
    modules = models_of(pipe)
    if isinstance(state, PipelineState):
        return state
    placed = {
        name: distribution.distribution_of(module)
        for name, module in modules.items()
        if distribution.is_distributed(module)
    }
    if not placed:
        raise PlacementError(
            f"this {type(pipe).__name__} is not distributed: load it with load_pipeline, or call "
            "distribute_pipeline(pipe, spec)"
        )
    first = next(iter(placed.values()))
    placement = {
        f"{part}.{name}": device
        for part, known in placed.items()
        for name, device in known.plan.placement.items()
    }
    sizes = {
        f"{p}.{n}": size for p, known in placed.items() for n, size in known.plan.sizes.items()
    }
    plan = replace(first.plan, placement=placement, sizes=sizes, budget=None)
    state = PipelineState(plan, LoraSplitter(modules), first.options)
    pipe.__dict__[_KEY] = state
    refuse_other_offloading(pipe)
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
            inner = getattr(part, "_orig_mod", part)  # torch.compile's wrapper
            found.setdefault(id(inner), (name, inner))
    if not found:
        raise SpecError(f"this {type(pipe).__name__} has no models")
    return dict(found.values())


def set_pipeline_loras(
    pipe: Any,
    loras: Sequence[PipelineLora],
    *,
    strict_loras: bool = True,
    lora_mode: LoraMode | None = None,
    patched_dtype: torch.dtype | str | None = None,
    progress: Progress = None,
) -> Any:
    """Puts these LoRAs, and no others, on the parts of a distributed pipeline.

    Only what changes is computed, from the weights' original bytes. Adapters that diffusers or PEFT
    put on stay; there is a warning.

    Args:
        pipe: A pipeline with distributed models.
        loras: Pairs of a LoRA and its strength, or triples with the part's name. [] takes all off.
        strict_loras: Whether every key of a LoRA has to fit a weight.
        lora_mode: "merge", "fetch" or "background", as in `distorch.set_loras`.
        patched_dtype: As in `distorch.set_loras`.
        progress: As in `distorch.distribute`.

    Returns:
        The pipeline itself.

    Raises:
        SpecError: An argument is wrong.
        FormatError: A LoRA is missing, damaged, or fits nothing.
        PlacementError: No model is distributed, or a weight cannot be patched.
        FetchError: Original bytes could not be read.

    After any of them all parts have the LoRAs that they had.
    """
    state, modules = state_of(pipe), models_of(pipe)
    if set(state.splitter.parts) != set(modules):  # parts came or went
        state.splitter = LoraSplitter(modules)
    shares = state.splitter.split(loras, strict_loras)
    modules = {n: m for n, m in modules.items() if shares[n] or distribution.is_distributed(m)}
    _put_loras(
        modules, shares, strict_loras=strict_loras, lora_mode=lora_mode,
        patched_dtype=patched_dtype, progress=progress,
    )  # fmt: skip
    return pipe


def _put_loras(modules: Mapping[str, nn.Module], shares: PartLoras, **options: Any) -> None:
    """`set_loras` on each of these parts. All or none: an error leaves what was on them."""
    done: list[tuple[nn.Module, list[tuple[Any, float]], dict[str, Any]]] = []
    try:
        for name, module in modules.items():
            before, how = _loras_on(module)
            if shares[name] or before:
                set_loras(module, shares[name], **options)
                done.append((module, before, how))
    except BaseException:
        for module, before, how in reversed(done):
            try:
                set_loras(module, before, strict_loras=False, progress=False, **how)
            except Exception as error:  # the first one is raised, and the others go on
                _LOG.error("the LoRAs of a part could not be put back: %s", error)
        raise


def _loras_on(module: nn.Module) -> tuple[list[tuple[Any, float]], dict[str, Any]]:
    """What is on a module, and the options with which it was put there."""
    known = distribution.distribution_of(module).patching
    if known is None:
        return [], {}
    how = {"lora_mode": known.options.mode, "patched_dtype": known.options.dtype}
    return known.sources(), how

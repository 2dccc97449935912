# SPDX-License-Identifier: Apache-2.0
"""Nodes for the tests: conditioning without a text encoder, and outputs as hashes and figures."""

import ctypes
import gc
import hashlib
import json
import sys

import comfy.model_management as management
import torch


class AnyType(str):
    def __ne__(self, other):
        return False


ANY = AnyType("*")


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from _tensors(value[key])
    elif hasattr(value, "last_hidden_state"):  # what CLIP vision says of an image
        yield from _tensors(vars(value))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


class TestConditioning:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "make", ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        ints = ("INT", {"default": 0, "max": 1 << 30})
        return {"required": {"seed": ints, "tokens": ints, "width": ints, "pooled": ints}}

    def make(self, seed, tokens, width, pooled):
        generator = torch.Generator().manual_seed(seed)
        cross = torch.randn(1, tokens, width, generator=generator)
        extra = {"pooled_output": torch.randn(1, pooled, generator=generator), "guidance": 3.5}
        return ([[cross, extra]],)


class TestImage:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "make", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seed": ("INT", {"default": 0}),
                "size": ("INT", {"default": 64, "max": 4096}),
            }
        }

    def make(self, seed, size):
        return (torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(seed)),)


class TestWanText:
    """What WanVideoWrapper's text encoder gives out: tokens of noise, negative ones, too."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "make", ("WANVIDEOTEXTEMBEDS",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 0})}}

    def make(self, seed):
        generator = torch.Generator().manual_seed(seed)
        made = [torch.randn(16, 4096, generator=generator) for _ in range(2)]
        return ({"prompt_embeds": made[:1], "negative_prompt_embeds": made[1:]},)


class TestEmbeds:
    """What CLIP vision says of an image, as IP adapters take it."""

    CATEGORY, FUNCTION, RETURN_TYPES = "test", "make", ("EMBEDS",)

    @classmethod
    def INPUT_TYPES(cls):
        ints = ("INT", {"default": 0, "max": 1 << 30})
        return {"required": {"seed": ints, "width": ints}}

    def make(self, seed, width):
        return (torch.randn(1, width, generator=torch.Generator().manual_seed(seed)),)


class Looks:
    """Shows something of any value, every time anew."""

    @classmethod
    def VALIDATE_INPUTS(cls, input_types=None):
        return True

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")


class TestHash(Looks):
    """SHA-256 of every tensor in a value; and whether they are finite and not constant."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "hash", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (ANY,)}}

    def hash(self, value):
        digest, good = hashlib.sha256(), True
        for tensor in _tensors(value):
            plain = tensor.detach().contiguous().cpu()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
            if plain.is_floating_point() and plain.numel() > 16:
                good = good and bool(plain.isfinite().all()) and float(plain.float().std()) > 0
        return {"ui": {"hash": [digest.hexdigest()], "good": [good]}, "result": ()}


class TestFigures(Looks):
    """The placement of a patcher's model and the host's own figures, after `after`."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "tell", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": (ANY,)}, "optional": {"after": (ANY,)}}

    def tell(self, model, after=None):
        patcher = model if hasattr(model, "add_patches") and hasattr(model, "load_device") else None
        patcher = patcher or getattr(model, "patcher", None) or model.control_model_wrapped
        found = {
            "class": type(patcher).__name__,
            "model_size": patcher.model_size(),
            "loaded_size": patcher.loaded_size(),
            "device": str(patcher.current_loaded_device()),
            "loaded": [
                [type(m.model.model).__name__, m.model_memory(), m.model_loaded_memory()]
                for m in management.current_loaded_models
                if m.model is not None
            ],
            "pinned": getattr(management, "TOTAL_PINNED_MEMORY", 0),  # by the host itself
        }
        if hasattr(torch, "sim"):
            found["used"] = [torch.sim.memory_allocated(index) for index in range(2)]
        try:
            import distorch
            from distorch.runtime.distribution import distribution_of, is_distributed
        except ImportError:
            distorch = None
        if distorch is not None and is_distributed(patcher.model):
            report = distorch.report(patcher.model)
            plan = distribution_of(patcher.model).plan
            found |= {
                "measured": report.bytes,
                "planned": plan.bytes,
                "problems": report.problems,
                "spec": plan.spec,
                "fetches": distorch.stats(patcher.model).fetches,
                "backups": len(patcher.backup),
            }
        return {"ui": {"figures": [json.dumps(found)]}, "result": ()}


class _Mallinfo2(ctypes.Structure):
    """What glibc says of its heap; see mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def _heap():
    """Bytes that are in use, holes not counted."""
    asks = ctypes.CDLL(None).mallinfo2
    asks.restype = _Mallinfo2
    found = asks()
    return found.uordblks + found.hblkhd


class TestUsed(Looks):
    """Bytes in use on the simulated devices and in the heap, and Python's objects."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "tell", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": (ANY,)}}

    def tell(self, after):
        if "distorch.testing.sim" in sys.modules:
            sys.modules["distorch.testing.sim"].reset()  # it keeps a record of all operators
        gc.collect()
        used = [torch.sim.memory_allocated(index) for index in range(2)]
        return {"ui": {"used": used, "heap": [_heap()], "objects": [len(gc.get_objects())]}}


class TestFetches(Looks):
    """How many sharded weights operators have asked for, since the process began."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "tell", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": (ANY,)}}

    def tell(self, after):
        from distorch import _C

        return {"ui": {"fetches": [_C.fetch_count()]}}


class TestSamplingMemory(Looks):
    """What presets take for the need of FLUX, and what the host says of a FLUX that is there."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "tell", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    def tell(self, model):
        from distorch.comfy import host

        found = host.sampling_memory("Flux", {}, (1, 16, 128, 128))
        said = model.model.memory_required([2, 16, 128, 128])
        said += management.extra_reserved_memory()
        return {"ui": {"need": [found, max(said, management.minimum_inference_memory())]}}


class TestNeed(Looks):
    """Another model's need: so many bytes more than are free, asked of the host."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "ask", (ANY,), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": (ANY,), "nbytes": ("INT", {"default": 0, "max": 1 << 40})}}

    def ask(self, after, nbytes):
        device = management.get_torch_device()
        before = management.get_free_memory(device)
        management.free_memory(before + nbytes, device)
        freed = management.get_free_memory(device) - before
        return {"ui": {"freed": [freed]}, "result": (freed,)}


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        TestConditioning, TestImage, TestWanText, TestEmbeds, TestHash, TestFigures, TestNeed, TestUsed,
        TestFetches,
        TestSamplingMemory,
    )
}  # fmt: skip

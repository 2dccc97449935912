"""Names without what wrappers put into them: torch.compile, FSDP, checkpointed activations."""

from __future__ import annotations

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(name: str) -> str:
    """A name of a weight or module as it is in the module that was wrapped."""
    if "_orig_mod" not in name and "_wrapped_module" not in name:
        return name
    return ".".join(step for step in name.split(".") if step not in _WRAPPERS)

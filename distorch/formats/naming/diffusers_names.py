"""Original names -> those of a diffusers module: its own conversions say how."""

from __future__ import annotations

from typing import Any

from torch import nn

from distorch.formats.naming.tracing import Convert


def conversion_for(module: nn.Module) -> Convert | None:
    """What `from_single_file` of the module's class does to a state dict; None if it has none."""
    classes = [cls for cls in type(module).__mro__ if cls.__module__.startswith("diffusers.")]
    if not classes:
        return None
    from diffusers.loaders import single_file_model

    table: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    known = next((cls.__name__ for cls in classes if cls.__name__ in table), None)
    if known is None:
        return None
    function = table[known]["checkpoint_mapping_fn"]
    config = dict(getattr(module, "config", {}))
    return lambda checkpoint: function(checkpoint=checkpoint, config=config)

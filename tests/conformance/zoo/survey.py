# SPDX-License-Identifier: Apache-2.0
"""python -m tests.conformance.zoo.survey: which model types of transformers can be made tiny.

Writes `transformers.txt` anew: for every type the first class, of those that the auto classes
name, that is built from a shrunk configuration and runs; as comments, the types that are not, and
why. Takes about half an hour; needed again only for another version of transformers.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from .transformers_models import build

_SECONDS = 90
_MEMORY = 6 << 30
_HEAD = "# Model type and the class that stands for it: made by `survey`.\n"

# The heads that do most of their model's work, first.
_HEADS = """
    SEQ_TO_SEQ_CAUSAL_LM MULTIMODAL_LM IMAGE_TEXT_TO_TEXT CAUSAL_LM SPEECH_SEQ_2_SEQ
    TEXT_TO_WAVEFORM TEXT_TO_SPECTROGRAM CTC RNNT TDT MASKED_LM OBJECT_DETECTION
    UNIVERSAL_SEGMENTATION SEMANTIC_SEGMENTATION DEPTH_ESTIMATION MASK_GENERATION
    VIDEO_CLASSIFICATION TIME_SERIES_PREDICTION IMAGE_CLASSIFICATION AUDIO_CLASSIFICATION
    SEQUENCE_CLASSIFICATION
"""


def classes() -> dict[str, list[str]]:
    """Model type -> names of classes, the fullest first, the bare model last."""
    from transformers.models.auto import configuration_auto, modeling_auto

    sources = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in _HEADS.split()]
    found: dict[str, list[str]] = {}
    for kind in configuration_auto.CONFIG_MAPPING_NAMES:
        for source in [*sources, "MODEL_MAPPING_NAMES"]:
            named = getattr(modeling_auto, source).get(kind)
            if named is not None:
                name = named if isinstance(named, str) else named[0]
                found.setdefault(kind, []).append(name)
    return {kind: list(dict.fromkeys(names)) for kind, names in found.items()}


def _try(kind: str, names: list[str], out: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    reasons = []
    for name in names:
        try:
            build(kind, name)
        except Exception as error:
            reasons.append(re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:100])
        else:
            out.send(f"{kind} {name}")
            return
    out.send(f"# {kind}: {reasons[0]}")


def _line(kind: str, names: list[str]) -> str:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_try, args=(kind, names, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(_SECONDS) else f"# {kind}: took too long"
    except EOFError:
        return f"# {kind}: the process died"
    finally:
        child.kill()
        child.join()


def main() -> None:
    from tqdm import tqdm

    found = classes()
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(_line, found, found.values())
        lines = list(tqdm(results, total=len(found), disable=None, unit="model type"))
    lines.sort(key=lambda line: (line.startswith("#"), line.casefold()))
    (Path(__file__).parent / "transformers.txt").write_text(_HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

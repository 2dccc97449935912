# SPDX-License-Identifier: Apache-2.0
"""What fuzzing has found stays mended, and a few hundred mutations of each seed do no harm."""

import gc
import random
from pathlib import Path

import pytest

from tests.amount import ALL
from tests.fuzz import targets
from tests.fuzz.targets import TARGETS

FOUND = Path(__file__).parent / "found"
MUTATIONS = 3000 if ALL else 100
SHORT = 512


@pytest.fixture(scope="module", autouse=True)
def _nothing_kept():
    """The model that LoRAs are put on has a scratch file, which other tests would find."""
    yield
    targets._patched_net.cache_clear()
    gc.collect()


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_found(name):
    """Each file was an error of another kind than distorch's, or a crash, once."""
    TARGETS[name].run(b"")
    for path in sorted((FOUND / name).glob("*")):
        TARGETS[name].run(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_mutations(name):
    target = TARGETS[name]
    seeds = list(target.seeds())
    words = [word.encode() for word in target.words]
    dice = random.Random(0)
    for seed in seeds:
        target.run(seed)
    for _ in range(MUTATIONS):
        target.run(mutated(dice, dice.choice(seeds), words))


def mutated(dice, data, words):
    """Some bytes changed, cut out, doubled, or replaced by a word."""
    made = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randint(0, len(made))
        length = dice.choice([1, 1, 1, 2, 4, 8, 32])
        kind = dice.randrange(5)
        if kind == 0:
            made[at : at + length] = dice.randbytes(length)
        elif kind == 1:
            del made[at : at + length]
        elif kind == 2:
            made[at:at] = made[at : at + length]
        elif kind == 3 and words:
            made[at : at + dice.choice([0, length])] = dice.choice(words)
        elif at < len(made):
            made[at] ^= 1 << dice.randrange(8)
    return bytes(made)


def test_every_found_file_is_of_a_target():
    assert {path.name for path in FOUND.iterdir()} <= set(TARGETS)
    assert all(path.stat().st_size <= SHORT * 16 for path in FOUND.rglob("*") if path.is_file())

# SPDX-License-Identifier: Apache-2.0
"""What decode_ and decoded weights refuse: parts that do not fit the matrix."""

import pytest
import torch

from distorch import _C, _ops

ROWS, COLUMNS = 64, 256


def parts(**changed):
    """Arguments of _ops.decode that fit each other, but for those that are changed."""
    fitting = {
        "into": torch.full((ROWS, COLUMNS), 7.0),
        "stored": torch.zeros(ROWS, COLUMNS, dtype=torch.int8),
        "code": "int8",
        "scales": torch.ones(2, 2),
        "block": (32, 128),
    }
    return fitting | changed


def patch(up, down, first_row=0):
    terms = _ops.Terms()
    terms.add(torch.ones(up), torch.ones(down), 1.0, first_row)
    return terms


FITS = f"fit a weight of \\[{ROWS}, {COLUMNS}\\]"
WRONG = {
    "a grid with a row too few": ({"scales": torch.ones(1, 2)}, FITS),
    "a grid with a column too few": ({"scales": torch.ones(2, 1)}, FITS),
    "a grid with a column too many": ({"scales": torch.ones(2, 3)}, FITS),
    "a grid of one dimension": ({"scales": torch.ones(4)}, FITS),
    "scales of another dtype": ({"scales": torch.ones(2, 2, dtype=torch.float64)}, FITS),
    "strided scales": ({"scales": torch.ones(2, 4)[:, ::2]}, FITS),
    "blocks of no rows": ({"block": (0, 128)}, FITS),
    "blocks of no columns": ({"block": (32, -1)}, FITS),
    "rows that are no whole blocks": (
        {"code": "Q4_K", "into": torch.zeros(64, 255)},
        "whole blocks",
    ),
    "bytes that are missing": ({"stored": torch.zeros(ROWS, 255, dtype=torch.int8)}, "expected"),
    "a patch with too many rows": ({"terms": patch((ROWS + 1, 2), (2, COLUMNS))}, FITS),
    "a patch that begins too late": ({"terms": patch((ROWS, 2), (2, COLUMNS), 1)}, FITS),
    "a patch that begins before": ({"terms": patch((ROWS, 2), (2, COLUMNS), -1)}, FITS),
    "a patch with too few columns": ({"terms": patch((ROWS, 2), (2, COLUMNS - 1))}, FITS),
    "factors of two ranks": ({"terms": patch((ROWS, 2), (3, COLUMNS))}, FITS),
    "a stack with too many rows": ({"terms": patch((2, 33, 2), (2, 2, COLUMNS))}, FITS),
    "a stack that begins too late": ({"terms": patch((2, 32, 2), (2, 2, COLUMNS), 1)}, FITS),
    "stacks of two sizes": ({"terms": patch((2, 32, 2), (1, 2, COLUMNS))}, FITS),
    "a stack and a matrix": ({"terms": patch((2, 32, 2), (2, COLUMNS))}, FITS),
    "stacks of stacks": ({"terms": patch((1, 2, 32, 2), (1, 2, 2, COLUMNS))}, FITS),
}


@pytest.mark.parametrize("what", WRONG)
def test_parts_that_do_not_fit(what):
    changed, message = WRONG[what]
    arguments = parts(**changed)
    into = arguments["into"].clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        _ops.decode(**arguments)
    assert torch.equal(arguments["into"], into)  # nothing was written


def test_a_stack_of_products_is_one_for_each_part_of_the_rows():
    torch.manual_seed(0)
    ups, downs = torch.randn(5, 7, 3), torch.randn(5, 3, COLUMNS)
    stack, single = _ops.Terms(), _ops.Terms()
    stack.add(ups, downs, 0.7, 11)
    for i in range(5):
        single.add(ups[i], downs[i], 0.7, 11 + 7 * i)
    for code, dtype in (("bfloat16", torch.bfloat16), ("int8", torch.int8)):
        stored = torch.randn(ROWS, COLUMNS).to(dtype)
        found = [torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16) for _ in range(2)]
        for into, terms in zip(found, (stack, single), strict=True):
            _ops.decode(into, stored, code, terms=terms)
        assert torch.equal(*found)
        wanted = stored.float()
        for i in range(5):
            wanted[11 + 7 * i : 18 + 7 * i] += 0.7 * (ups[i] @ downs[i])
        torch.testing.assert_close(found[0], wanted.bfloat16(), rtol=2**-7, atol=1e-3)


def test_grids_that_end_within_a_block():
    """Blocks at the edges may be cut: 64 x 256 in blocks of 48 x 100 has a grid of 2 x 3."""
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    arguments = parts(stored=torch.ones(ROWS, COLUMNS, dtype=torch.int8), scales=scales)
    _ops.decode(**arguments | {"block": (48, 100)})
    each = scales.repeat_interleave(48, 0)[:ROWS].repeat_interleave(100, 1)[:, :COLUMNS]
    assert torch.equal(arguments["into"], each)


TURNED = {
    "no power of 4": ({"rotation": 8}, "not turned in groups of 8"),
    "too large": ({"rotation": 4**7}, "not turned in groups of 16384"),
    "negative": ({"rotation": -4}, "not turned in groups of -4"),
    "columns that are not whole groups": ({"rotation": 1024}, "not turned in groups of 1024"),
    "scales within a group": (
        {"rotation": 256, "scales": torch.ones(2, 2), "block": (32, 128)}, "scale for 128 columns"
    ),
    "a table for nothing": ({"table": torch.ones(1)}, "int8 takes a table of 0 numbers, not of 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", TURNED)
def test_rotations_and_tables_that_do_not_fit(case):
    options, message = TURNED[case]
    plain = torch.zeros(ROWS, COLUMNS, dtype=torch.int8)
    with pytest.raises(ValueError, match=message):
        _ops.decode(parts()["into"], plain, "int8", **options)
    stored = _ops.shard_host(plain, torch.device("cpu"), "w")
    with pytest.raises(ValueError, match=message):
        _ops.decoded(stored, "int8", torch.float32, [ROWS, COLUMNS], name="w", **options)


def test_blocks_that_need_a_table():
    blocks = torch.zeros(ROWS, COLUMNS // 16 * 9, dtype=torch.uint8)
    into = torch.empty(ROWS, COLUMNS)
    for table in (
        None,
        torch.ones(15),
        torch.ones(16, dtype=torch.float64),
        torch.ones(16, 2)[:, 0],
    ):
        with pytest.raises(ValueError, match="a table"):
            _ops.decode(into, blocks, "W4x16", table=table)
    with pytest.raises(ValueError, match="W4x16 that needs no table"):
        _ops.dequantise(blocks, "W4x16", torch.float32)
    assert _ops.dequantise(torch.zeros(1, 8, dtype=torch.uint8), "I4x16", torch.float32).sum() == 0


INTERLEAVED = {
    "no parts": (8, []),
    "another number of rows": (9, [(2, 1), (3, 8)]),
    "bytes that are not those of blocks": (9, [(2, 2), (2, 9)]),
    "no room": (8, [(2, 1), (2, 8)]),
    "no blocks": (0, [(2, 0), (2, 0)]),
}


@pytest.mark.parametrize("case", INTERLEAVED)
def test_parts_that_do_not_make_blocks(case):
    columns, shapes = INTERLEAVED[case]
    made = [torch.zeros(*shape, dtype=torch.uint8) for shape in shapes]
    with pytest.raises(ValueError, match="interleave_"):
        _ops.interleave(torch.zeros(2, columns, dtype=torch.uint8), made)


def test_a_sharded_weight_whose_scales_do_not_fit():
    plain = torch.zeros(ROWS, COLUMNS, dtype=torch.int8)
    stored = _ops.shard_host(plain, torch.device("cpu"), "w")
    with pytest.raises(ValueError, match="scales .* do not " + FITS):
        _ops.decoded(
            stored, "int8", torch.float32, [ROWS, COLUMNS],
            scales=torch.ones(1, 2), block=(32, 128), name="w",
        )  # fmt: skip


def test_devices_on_which_nothing_decodes():
    assert _ops.can_decode(torch.device("cpu"))
    assert not _ops.can_decode(torch.device("xpu"))
    kernel = _C.decode_kernel("cpu")
    _C.set_decode_kernel("cpu", 0)
    try:
        with pytest.raises(NotImplementedError, match="CPU and on CUDA devices, not on cpu"):
            _ops.decode(**parts())
    finally:
        _C.set_decode_kernel("cpu", kernel)
    _ops.decode(**parts())

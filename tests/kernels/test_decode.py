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
}


@pytest.mark.parametrize("what", WRONG)
def test_parts_that_do_not_fit(what):
    changed, message = WRONG[what]
    arguments = parts(**changed)
    into = arguments["into"].clone()
    with pytest.raises((ValueError, RuntimeError), match=message):
        _ops.decode(**arguments)
    assert torch.equal(arguments["into"], into)  # nothing was written


def test_grids_that_end_within_a_block():
    """Blocks at the edges may be cut: 64 x 256 in blocks of 48 x 100 has a grid of 2 x 3."""
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    arguments = parts(stored=torch.ones(ROWS, COLUMNS, dtype=torch.int8), scales=scales)
    _ops.decode(**arguments | {"block": (48, 100)})
    each = scales.repeat_interleave(48, 0)[:ROWS].repeat_interleave(100, 1)[:, :COLUMNS]
    assert torch.equal(arguments["into"], each)


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

# SPDX-License-Identifier: Apache-2.0
"""The grammar: what is accepted means what it says, what is not says where and why."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distorch.errors import SpecError
from distorch.planner.spec import Bytes, Fraction, Percent, Rest, parse_bytes, parse_spec

G = 1 << 30

GOOD = {
    "cuda:0,2.5gb;cpu,*": [("cuda:0", Bytes(2684354560)), ("cpu", Rest())],
    "cuda:0,500mb;cuda:1,3.0g;cpu,*": [
        ("cuda:0", Bytes(500 << 20)), ("cuda:1", Bytes(3 * G)), ("cpu", Rest()),
    ],
    "cuda:0,25%;cpu,75%": [("cuda:0", Percent(Decimal(25))), ("cpu", Percent(Decimal(75)))],
    "cuda:0,0b;cpu,*": [("cuda:0", Bytes(0)), ("cpu", Rest())],
    "cpu,2gb;disk,*": [("cpu", Bytes(2 * G)), ("disk", Rest())],
    "cuda:0,0.4;cpu,*": [("cuda:0", Fraction(Decimal("0.4"))), ("cpu", Rest())],
    " CUDA , 64 KiB ; CPU , * ;": [("cuda:0", Bytes(65536)), ("cpu", Rest())],
    "xpu:3,1t;disk,0.5": [("xpu:3", Bytes(1 << 40)), ("disk", Fraction(Decimal("0.5")))],
    "cuda:00,7b;cpu,*": [("cuda:0", Bytes(7)), ("cpu", Rest())],
}  # fmt: skip

BAD = {
    "": "empty",
    ";": "empty",
    "cuda:0,2gb;;cpu,*": "entry 2",
    "cuda:0": "expected 'device,share'",
    "cuda:0,1gb,2gb": "found 3 part(s)",
    "cdua:0,1gb": "did you mean 'cuda'",
    "gpu,1gb": "unknown device",
    "cuda:x,1gb": "is not a device",
    "cuda:-1,1gb": "is not a device",
    "cpu:1,2gb": "has an index",
    "cuda:0,": "share is missing",
    "cuda:0,2.5;cpu,*": "did you mean '2.5gb'",
    "cuda:0,-1gb": "negative",
    "cuda:0,2xb": "unknown unit 'xb'",
    "cuda:0,1ib": "unknown unit 'ib'",
    "cuda:0,1e3gb": "is not a share",
    "cuda:0,nan": "is not a share",
    "cuda:0,٣gb": "is not a share",
    "cuda:0,inf": "is not a share",
    "cuda:0,gb": "is not a share",
    "cuda:0,1..5gb": "is not a share",
    "cuda:0,**": "is not a share",
    "cpu,*;disk,*": "second '*'",
    "cpu,1gb;cpu,*": "already given in entry 1",
    "cuda,1gb;cuda:0,*": "already given in entry 1",
    "cuda:0,60%;disk,50%;cpu,*": "add up to 110%",
    "cuda:0,101%;cpu,*": "add up to 101%",
    "cuda:0,0%;cpu,0%": "ratio of zeros",
    "auto;cpu,*": "expected 'device,share'",
}


@pytest.mark.parametrize("text", GOOD)
def test_good(text):
    spec = parse_spec(text)
    assert [(entry.device, entry.share) for entry in spec.entries] == GOOD[text]
    assert [entry.position for entry in spec.entries] == list(range(1, len(GOOD[text]) + 1))


@pytest.mark.parametrize("text", BAD)
def test_bad(text):
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    assert BAD[text] in str(caught.value)
    assert repr(text) in str(caught.value)


def test_error_names_entry_and_column():
    with pytest.raises(SpecError, match=r"entry 2 \('cpu,2xb', column 12\)"):
        parse_spec("cuda:0,1gb;cpu,2xb")


def test_old_trap_two_terabytes():
    assert parse_spec("cpu,2tb;disk,*").entries[0].share == Bytes(2 << 40)


def test_ratio_is_scale_free():
    assert parse_spec("cuda:0,25%;cpu,75%").is_ratio
    assert parse_spec("cuda:0,1%;cpu,300%").is_ratio
    assert not parse_spec("cuda:0,25%;cpu,*").is_ratio


def test_not_a_string():
    with pytest.raises(SpecError, match="expected a string"):
        parse_spec(5)


@pytest.mark.parametrize(("text", "nbytes"), [("4gb", 4 * G), ("0", None), (123, 123), ("7b", 7)])
def test_parse_bytes(text, nbytes):
    if nbytes is None:
        with pytest.raises(SpecError):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == nbytes


@given(st.text(max_size=40))
def test_any_text_is_a_spec_or_a_spec_error(text):
    try:
        spec = parse_spec(text)
    except SpecError:
        return
    assert spec.auto or spec.entries
    assert parse_spec(spec.text) == parse_spec(parse_spec(spec.text).text)


@given(st.sampled_from(sorted(GOOD)), st.randoms())
def test_blanks_and_case_do_not_matter(text, random):
    noisy = "".join(
        (" " * random.randint(0, 2) if c in ",;" else "") + random.choice([c.upper(), c.lower()])
        for c in text
    )
    assert [(e.device, e.share) for e in parse_spec(noisy).entries] == GOOD[text]


def test_stripes():
    spec = parse_spec(" cuda:0,1gb ; CPU + cuda:1 , * ")
    assert [entry.device for entry in spec.entries] == ["cuda:0", "cpu+cuda:1"]
    for wrong in ("cpu+disk,*", "cpu+cpu,*", "cpu+,*", "+cpu,*", "cpu+moon,*"):
        with pytest.raises(SpecError, match="entry 1"):
            parse_spec(wrong)

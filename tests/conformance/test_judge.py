# SPDX-License-Identifier: Apache-2.0
"""The sweep finds what is wrong: other bits, exceptions, processes that die."""

import os
from functools import partial

import pytest
import torch

from . import cases, evidence, models
from .cases import FAILS, NOT_APPLICABLE, OK, Case, judge, run_architecture
from .checks import CHECKS, Built
from .systems import SYSTEMS, Distorch, Resident
from .zoo import PLAIN


def _slightly_more(module, arguments, output):
    return output * 1.01


class Wrong(Resident):
    """Another weight, and another output."""

    name = "wrong"

    def distribute(self, module):
        with torch.no_grad():
            next(module.parameters()).flatten()[:1] += 0.25
        module.register_forward_hook(_slightly_more)
        return module


class Refuses(Resident):
    name = "refuses"

    def distribute(self, module):
        raise ValueError("not today")


class Dies(Resident):
    name = "dies"

    def distribute(self, module):
        os._exit(3)


def verdicts(system, check, built=None):
    built = built or PLAIN["shared_module"]()
    return [(verdict, reason) for _, verdict, reason in judge(built, check, [system])]


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_sees_wrong_numbers(check):
    (verdict, _), *_ = verdicts(Wrong(), check)
    resident, *_ = verdicts(Resident(), check)
    assert (verdict, resident[0]) in ((FAILS, OK), (NOT_APPLICABLE, NOT_APPLICABLE))
    assert resident[0] == OK or check in ("generate", "save_pretrained")


def test_what_went_wrong_is_told():
    ((verdict, reason),) = verdicts(Refuses(), "forward")
    assert verdict == FAILS and "not today" in reason and "test_judge.py" in reason


def test_what_the_resident_model_cannot_do_does_not_count():
    assert verdicts(Refuses(), "generate") == [(NOT_APPLICABLE, "the model does not generate")]


class Restless(torch.nn.Linear):
    calls = 0

    def forward(self, x):
        Restless.calls += 1
        return super().forward(x) + Restless.calls


def test_a_model_that_never_repeats_does_not_count():
    built = Built(Restless(2, 2), arguments=(torch.ones(1, 2),))
    ((verdict, reason),) = verdicts(Resident(), "forward", built)
    assert verdict == NOT_APPLICABLE and "does not repeat" in reason


def test_a_process_that_dies_costs_its_case(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "dies", Dies())
    found = run_architecture("linear", PLAIN["linear"], ["forward", "repeat"], ["distorch", "dies"])
    told = {(case.check, case.system): case.verdict for case in found}
    assert told == {
        ("forward", "distorch"): OK,
        ("forward", "dies"): FAILS,
        ("repeat", "distorch"): OK,
        ("repeat", "dies"): FAILS,
    }, found


def test_a_model_that_cannot_be_built_is_told():
    (found,) = run_architecture("none", partial(int, "none"), ["forward"], ["distorch"])
    assert (found.verdict, found.reason) == (NOT_APPLICABLE, "the model could not be built")


def test_weights_that_stay_are_seen():
    with pytest.raises(AssertionError, match="stayed"):
        Distorch("all at home", "cpu,*", "").distribute(torch.nn.Linear(2, 2))


def test_evidence():
    nan = torch.tensor([1.0, float("nan")])
    assert evidence.difference([nan, {"a": 1}], [nan.clone(), {"a": 1}]) is None
    for got, wanted in [
        (nan, torch.tensor([1.0, 0.0])), (nan, nan.double()), ([nan], [nan, nan]),
        ({"a": 1}, {"b": 1}), ("x", "y"), (1, True), (nan, torch.empty(2, device="meta")),
    ]:  # fmt: skip
        assert evidence.difference(got, wanted) is not None
        assert evidence.difference({"k": [got]}, {"k": [wanted]}).startswith(".k.0")


def test_rates():
    found = [Case("a", "forward", "distorch", verdict) for verdict in (OK, OK, FAILS)]
    found.append(Case("a", "repeat", "distorch", NOT_APPLICABLE))
    assert models.rates(found) == {
        "distorch": {
            "forward": {"ok": 2, "applicable": 3},
            "repeat": {"ok": 0, "applicable": 0},
        }
    }
    assert "| forward | 2/3 |" in models.table(found)
    assert "66.7 %" in models.table(found)


def test_command(tmp_path, capsys):
    file = tmp_path / "out.json"
    given = ["--only", "linear", "--check", "forward", "--json", str(file)]
    assert models.main(given) == 0
    assert "| forward | 1/1 |" in capsys.readouterr().out
    assert '"torch"' in file.read_text()
    assert models.main(["--only", "no such model"]) == 2
    assert cases.OK == "ok"

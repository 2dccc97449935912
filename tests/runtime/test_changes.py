# SPDX-License-Identifier: Apache-2.0
"""Threads, signals and forks in the middle of changes of a module."""

import contextlib
import os
import signal
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules import module as torch_modules

import distorch
from distorch import PlacementError
from distorch._native import calling, has_turn
from distorch.runtime import changes

SIZE, LAYERS = 32, 4
X = torch.ones(2, SIZE)


class Part(nn.Linear):
    """It may stop in the middle of a forward pass."""

    gate = None

    def forward(self, x):
        if self.gate is not None:
            self.gate()
        return super().forward(x)


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(Part(SIZE, SIZE, bias=False) for _ in range(LAYERS))).eval()


def placed(spec="cpu,0b;disk,*"):
    return distorch.distribute(net(), spec, min_bytes=0, compute="cpu", prefetch="16kb")


def lora(seed=1):
    dice = torch.Generator().manual_seed(seed)
    return {
        f"{i}.lora_{side}.weight": torch.randn(shape, generator=dice)
        for i in range(LAYERS)
        for side, shape in (("A", (2, SIZE)), ("B", (SIZE, 2)))
    }


@torch.no_grad()
def output(model):
    return model(X)


def with_lora():
    return output(distorch.set_loras(placed(), [(lora(), 1.0)]))


def at_once(*works):
    """Runs these in threads; returns what they raised."""
    errors = []
    barrier = threading.Barrier(len(works))

    def run(work):
        barrier.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return errors


@pytest.mark.parametrize("mode", ["merge", "fetch", "background"])
def test_two_threads_set_loras_at_once(mode):
    model, wanted = placed("cpu,50%;disk,*"), output(net())
    for _ in range(15):
        errors = at_once(*(
            lambda seed=seed: distorch.set_loras(model, [(lora(seed), 1.0)], lora_mode=mode)
            for seed in (1, 2)
        ))  # fmt: skip
        assert errors == []
        distorch.set_loras(model, [])
        assert torch.equal(output(model), wanted)


def test_placements_and_loras_at_once():
    model, wanted = placed(), output(net())
    specs = ("cpu,*", "cpu,50%;disk,*", "cpu,0b;disk,*")
    for _ in range(15):
        errors = at_once(
            *(lambda spec=spec: distorch.redistribute(model, spec) for spec in specs),
            lambda: distorch.set_loras(model, [(lora(), 1.0)], lora_mode="background"),
            lambda: distorch.finish_merging(model),
            lambda: str(distorch.report(model)),
            lambda: distorch.plan(model, "cpu,*"),
        )
        assert errors == []
        assert torch.equal(output(model), with_lora())
        distorch.set_loras(model, [])
        assert torch.equal(output(model), wanted)


def test_a_report_waits_for_the_end_of_a_change():
    model, reports, threads = placed(), [], []

    def look(_):
        threads.append(threading.Thread(target=lambda: reports.append(distorch.report(model))))
        threads[-1].start()

    distorch.redistribute(model, "cpu,*", progress=look)
    for thread in threads:
        thread.join()
    assert len(reports) == LAYERS and all(report.ok for report in reports)


def test_stats_do_not_wait():
    model, seen = placed(), []
    work = threading.Thread(target=lambda: seen.append(distorch.stats(model)))
    distorch.redistribute(model, "cpu,*", progress=lambda _: work.ident or work.start())
    work.join()
    assert len(seen) == 1


@pytest.mark.parametrize("change", [
    lambda model: distorch.set_loras(model, []),
    lambda model: distorch.redistribute(model, "cpu,50%;disk,*"),
    distorch.undistribute,
])  # fmt: skip
def test_a_change_inside_of_a_change_is_refused(change):
    model, wanted = placed(), output(net())
    with pytest.raises(PlacementError, match="was called back"):
        distorch.redistribute(model, "cpu,*", progress=lambda _: change(model))
    assert torch.equal(output(model), wanted) and distorch.report(model).ok
    change(model)
    assert torch.equal(output(model), wanted)


def test_a_signal_in_the_middle_of_a_change():
    model, wanted, errors = placed(), output(net()), []

    def handle(*_):
        try:
            distorch.redistribute(model, "cpu,*")
        except PlacementError as error:
            errors.append(str(error))

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        distorch.redistribute(
            model, "cpu,50%;disk,*", progress=lambda _: signal.raise_signal(signal.SIGUSR1)
        )
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert errors and all("was called back" in error for error in errors)
    assert torch.equal(output(model), wanted) and distorch.report(model).ok


def test_another_model_may_be_changed_meanwhile():
    model, other = placed(), placed()
    distorch.redistribute(model, "cpu,*", progress=lambda _: distorch.redistribute(other, "cpu,*"))
    assert distorch.report(model).ok and distorch.report(other).ok


def test_a_turn_ends_with_any_exception():
    model, me = placed(), threading.get_ident()
    parts = changes.parts_of(model)
    with pytest.raises(KeyboardInterrupt), changes.alone(model):
        assert has_turn(me, parts) and not has_turn(me, changes.parts_of(net()))
        raise KeyboardInterrupt
    assert not has_turn(me, parts)


def test_a_wait_for_a_turn_can_be_interrupted():
    model = placed()
    held, end = threading.Event(), threading.Event()

    def hold():
        with changes.alone(model):
            held.set()
            end.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    main = threading.main_thread().ident
    threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGUSR1)).start()
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            distorch.redistribute(model, "cpu,*")
    finally:
        signal.signal(signal.SIGUSR1, before)
        end.set()
        holder.join()
    distorch.redistribute(model, "cpu,*")


def pass_in_the_middle(model, after):
    """A thread in a forward pass that goes on when `after` is set, and where its output will be."""
    inside, outputs = threading.Event(), []

    def gate():
        model[2].gate = None
        inside.set()
        assert after.wait(60)

    model[2].gate = gate
    thread = threading.Thread(target=lambda: outputs.append(output(model)))
    thread.start()
    assert inside.wait(60)
    return thread, outputs


def changed_in_the_middle_of_a_pass(model, change):
    """The output of that pass."""
    go_on = threading.Event()
    thread, outputs = pass_in_the_middle(model, go_on)
    changer = threading.Thread(target=change)
    changer.start()
    while not torch_modules._global_forward_pre_hooks:  # it waits for passes
        pass
    go_on.set()
    thread.join()
    changer.join()
    return outputs[0]


def test_a_pass_that_has_begun_keeps_its_loras():
    model = placed()
    got = changed_in_the_middle_of_a_pass(model, lambda: distorch.set_loras(model, [(lora(), 1.0)]))
    assert torch.equal(got, output(net())), "some layers had the new LoRAs"
    assert torch.equal(output(model), with_lora())


def test_a_load_into_a_module_that_is_used(tmp_path):
    changed = {name: value + 1 for name, value in net().state_dict().items()}
    save_file(changed, tmp_path / "m.safetensors")
    model, wanted = placed(), net()
    got = changed_in_the_middle_of_a_pass(
        model, lambda: distorch.load(model, tmp_path / "m.safetensors", "cpu,*", min_bytes=0)
    )
    assert torch.equal(got, output(wanted))
    wanted.load_state_dict(changed)
    assert torch.equal(output(model), output(wanted))


def test_two_passes_that_change_their_own_model():
    """Each is in a forward hook: while one waits for its turn, it does not keep the other back."""
    model, both = placed(), threading.Barrier(2)

    def change(*_):
        both.wait()
        distorch.redistribute(model, "cpu,50%;disk,*")

    hook = model[1].register_forward_hook(change)
    assert at_once(lambda: output(model), lambda: output(model)) == []
    hook.remove()
    assert torch.equal(output(model), output(net()))


def in_a_child(work):
    """The status with which a forked child ends that does this."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os._exit(work())
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_fork_in_the_middle_of_set_loras():
    """The child has some weights with the LoRA, some without: it must not compute with them."""
    model, statuses = placed("cpu,*"), []

    def use():
        try:
            output(model)
        except PlacementError as error:
            return 3 if "when this process was forked" in str(error) else 4
        return 0

    def fork(_):
        thread = threading.Thread(target=lambda: statuses.append(in_a_child(use)))
        thread.start()
        thread.join()

    idle = threading.Event()  # with one thread, nobody has to be held back
    other = threading.Thread(target=idle.wait)
    other.start()
    try:
        distorch.set_loras(model, [(lora(), 1.0)], lora_mode="merge", progress=fork)
    finally:
        idle.set()
        other.join()
    assert statuses == [3] * LAYERS
    assert in_a_child(use) == 0


def test_a_child_may_change_what_was_being_changed():
    model, statuses = placed(), []

    def change():
        distorch.redistribute(model, "cpu,*")
        return 0 if torch.equal(output(model), wanted) else 1

    def fork(_):
        thread = threading.Thread(target=lambda: statuses.append(in_a_child(change)))
        thread.start()
        thread.join()

    wanted = output(net())
    distorch.redistribute(model, "cpu,50%;disk,*", progress=fork)
    assert set(statuses) == {0}


def test_threads_that_are_inside_of_a_call_are_found():
    model, go_on = placed(), threading.Event()
    thread, _ = pass_in_the_middle(model, go_on)
    code = nn.Module._call_impl.__code__
    assert calling(code, changes.parts_of(model)) == {thread.ident}
    assert calling(code, changes.parts_of(net())) == set()
    go_on.set()
    thread.join()
    assert calling(code, changes.parts_of(model)) == set()


@pytest.mark.parametrize("begins", [True, False])
def test_an_interrupt_while_the_merging_thread_is_started(begins, monkeypatch):
    model = placed("cpu,*")
    start = threading.Thread.start

    def interrupted(thread):
        if begins:
            start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        distorch.set_loras(model, [(lora(), 1.0)], lora_mode="background")
    monkeypatch.undo()
    assert torch.equal(output(model), with_lora())
    distorch.finish_merging(model)
    assert torch.equal(output(model), with_lora())
    distorch.set_loras(model, [], lora_mode="merge")
    assert torch.equal(output(model), output(net()))


def test_loras_set_in_inference_mode_leave_weights_that_train():
    model = placed("cpu,*")
    with torch.inference_mode():
        distorch.set_loras(model, [(lora(), 1.0)], lora_mode="merge")
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_empty_weights_are_of_one_thread_and_change_nothing_for_others():
    hooks = torch_modules._global_parameter_registration_hooks
    before = list(hooks)
    with distorch.init_empty_weights():
        assert list(hooks) == before, "PyTorch may be walking them in another thread"
        made = []
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        with distorch.init_empty_weights():
            assert nn.Linear(2, 2).weight.is_meta
        assert nn.Linear(2, 2).weight.is_meta
    assert not made[0].weight.is_meta and not nn.Linear(2, 2).weight.is_meta

# SPDX-License-Identifier: Apache-2.0
"""What is around sampling: the bar on the node that placed the model, and the current device."""

import html
import re
import sys
import threading
import time
import types

import pytest
import torch

import distorch
from distorch.comfy import host as border
from distorch.comfy import live
from distorch.display.tables import human_bytes
from tests.comfy.test_patcher import X, placed

NODE, SPEC = "12:3", "sim:0,200kb;cpu,*"


class Server:
    """What the host's server offers to a node."""

    def __init__(self, client_id):
        self.client_id = client_id
        self.sent = []

    def send_sync(self, event, data, sid):
        self.sent.append((event, data, sid))

    def said(self):
        """The text of each picture that was sent for our node."""
        assert {(event, data["number"], sid) for event, data, sid in self.sent} <= {
            ("distorch.bar", NODE, self.client_id)
        }
        return [html.unescape(re.sub(r"<[^>]*>", " ", data["svg"])) for _, data, _ in self.sent]


def _serve(monkeypatch, client_id):
    server = Server(client_id)
    monkeypatch.setattr(border, "node_now", lambda: NODE)
    holder = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", holder)
    return server


@pytest.fixture
def page(host, accelerators, monkeypatch):
    """A web page that waits for the prompt."""
    return _serve(monkeypatch, "page 1")


def ours():
    """As a node of ours gives it out, with a ring that is smaller than what travels."""
    with live.running("DistributeModel", {"spec": SPEC, "model": object()}):
        return placed(SPEC, "sim:0", prefetch="64kb")


def sample(patcher, steps=1, pause=0.0):
    """As the host's sampler does it, through the wrapper of ours."""
    from comfy.patcher_extension import WrappersMP

    def run():
        for _ in range(steps):
            patcher.model(X.to("sim:0")).cpu()
            time.sleep(pause)

    (wrapper,) = patcher.wrappers[WrappersMP.SAMPLER_SAMPLE]["distorch"]
    return wrapper(lambda guider: run(), types.SimpleNamespace(model_patcher=patcher))


def test_a_loaded_model_shows_where_it_is(host, page):
    patcher = ours()
    assert page.sent == []
    host.load_models_gpu([patcher])
    (said,) = page.said()
    for device, nbytes in distorch.report(patcher.model).bytes.items():
        assert f"{device}: {human_bytes(nbytes)}" in said
    assert "ring" in said


def test_moving_is_shown(host, page):
    patcher = ours()
    host.load_models_gpu([patcher])
    patcher.partially_unload(torch.device("cpu"), 100_000)
    first, second = page.said()
    assert first != second


def test_sampling_is_watched_from_step_to_step(host, page, monkeypatch):
    monkeypatch.setattr(live, "PERIOD", 0.02)
    patcher = ours()
    host.load_models_gpu([patcher])
    page.sent.clear()
    sample(patcher, steps=10, pause=0.02)
    said = page.said()
    assert len(said) >= 3
    assert any(re.search(r"cpu->sim:0 [0-9.]+ [GM]B/s", one) for one in said)
    assert all("stalls" in one for one in said)


def test_the_last_picture_is_about_the_whole_sampling(host, page, monkeypatch):
    patcher = ours()
    host.load_models_gpu([patcher])
    page.sent.clear()
    distorch.reset_stats(patcher.model)
    found = []
    monkeypatch.setattr(live, "sentence", lambda *figures: found.append(figures) or "figures")
    sample(patcher, steps=3)
    ((travelled, stall, seconds),) = found
    assert travelled == distorch.stats(patcher.model).bytes
    assert stall >= 0
    assert seconds > 0


def test_what_the_sentence_says():
    travelled = {"cpu->cuda:0": 3_000_000_000, "disk->cuda:0": 2_000_000, "cuda:1->cuda:0": 0}
    said = live.sentence(travelled, 0.5, 2.0)
    assert said == "cpu->cuda:0 1.50 GB/s   disk->cuda:0 1.0 MB/s   stalls 25%"
    assert live.rates(travelled, 2.0)["cpu->cuda:0"] == 1.5
    said = live.sentence({"cpu->cuda:0": 3 << 20}, 0.25, 0.0)  # the time is not known
    assert said == "cpu->cuda:0 3.00 MiB   stalls 0.25 s"
    assert live.sentence({}, 9.0, 3.0) == "nothing travels   stalls 100%"


def test_each_picture_is_about_what_was_since_the_last(host, page, monkeypatch):
    monkeypatch.setattr(live, "PERIOD", 0.05)
    patcher = ours()
    host.load_models_gpu([patcher])
    page.sent.clear()
    found = []
    monkeypatch.setattr(live, "sentence", lambda *figures: found.append(figures) or "figures")
    sample(patcher, steps=12, pause=0.03)
    *parts, (_, _, whole) = found
    assert len(parts) >= 3
    assert max(seconds for _, _, seconds in parts) < whole / 2


def test_counting_anew_in_the_middle_is_no_negative_rate(host, page, monkeypatch):
    patcher = ours()
    host.load_models_gpu([patcher])
    sample(patcher)
    page.sent.clear()
    since = live._Since(patcher.model)
    distorch.reset_stats(patcher.model)
    said = []
    since.tell(said.append)
    assert said == []
    live._Since(patcher.model).tell(said.append)
    assert said == ["nothing travels   stalls 0%"]


def test_a_program_that_asks_has_no_page(host, accelerators, monkeypatch):
    server = _serve(monkeypatch, None)
    monkeypatch.setattr(live, "watched", lambda *_: pytest.fail("nobody looks"))
    patcher = ours()
    host.load_models_gpu([patcher])
    sample(patcher)
    assert server.sent == []


def test_the_device_of_the_model_is_the_current_one_while_it_samples(host, page):
    patcher = placed("sim:1,200kb;cpu,*", "sim:1")
    host.load_models_gpu([patcher])
    seen = []
    patcher.model.forward = lambda x: seen.append(torch.sim.current_device()) or x
    sample(patcher)
    assert (seen, torch.sim.current_device()) == ([1], 0)


def test_an_error_of_the_sampler_comes_through_and_the_thread_ends(host, page):
    patcher = ours()
    host.load_models_gpu([patcher])

    def broken(*_):
        raise ValueError("of the sampler")

    patcher.model.forward = broken
    with pytest.raises(ValueError, match="of the sampler"):
        sample(patcher)
    assert not [one for one in threading.enumerate() if one.name == "distorch-bar"]


def test_without_a_thread_it_samples_all_the_same(host, page, monkeypatch):
    patcher = ours()
    host.load_models_gpu([patcher])
    page.sent.clear()

    def start(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    sample(patcher)
    assert len(page.said()) == 1


def test_a_model_that_is_undistributed_meanwhile(host, page):
    patcher = ours()
    host.load_models_gpu([patcher])
    since = live._Since(patcher.model)
    distorch.undistribute(patcher.model)
    since.tell(lambda said: pytest.fail(said))


def test_a_page_that_is_gone_disturbs_nobody(host, page, monkeypatch):
    def gone(*_):
        raise RuntimeError("Event loop is closed")

    monkeypatch.setattr(page, "send_sync", gone)
    monkeypatch.setattr(live, "PERIOD", 0.01)
    patcher = ours()
    host.load_models_gpu([patcher])
    sample(patcher, steps=2, pause=0.03)
    host.free_memory(1 << 50, torch.device("sim:0"))


def test_a_model_that_leaves_the_device_is_shown(host, page):
    patcher = ours()
    host.load_models_gpu([patcher])
    host.free_memory(1 << 50, torch.device("sim:0"))
    last = page.said()[-1]
    assert "at rest" in last
    for device, nbytes in distorch.report(patcher.model).bytes.items():
        assert f"{device}: {human_bytes(nbytes)}" in last or nbytes == 0


def test_the_node_is_told_with_what_was_typed(host, page):
    patcher = ours()
    host.load_models_gpu([patcher])
    (event, data, _) = page.sent[0]
    assert (event, data["kind"], data["typed"]) == (
        "distorch.bar", "DistributeModel", {"spec": SPEC},
    )  # fmt: skip
    assert patcher.clone().node == patcher.node


def test_every_node_of_ours_says_which_it_is(host, page):
    from distorch.comfy import NODE_CLASS_MAPPINGS

    node = NODE_CLASS_MAPPINGS["UNETLoaderDisTorch2MultiGPU"]()
    (model,) = node.load(
        unet_name="a", weight_dtype="default", compute_device="sim:0", eject_models=False,
        virtual_vram_gb=0.0, donor_device="cpu", expert_mode_allocations=SPEC,
    )  # fmt: skip
    assert (model.node.number, model.node.kind) == (NODE, "UNETLoaderDisTorch2MultiGPU")
    assert model.node.typed["expert_mode_allocations"] == SPEC
    assert live.running_node() is None


def test_watching_does_not_wait_for_the_device(host, accelerators):
    from distorch.testing import sim

    sim.configure(devices=2, memory="1gb", mode="deferred", links={("cpu", "sim:0"): (1e6, 0.0)})
    patcher = ours()
    host.load_models_gpu([patcher])
    distorch.reset_stats(patcher.model)
    y = patcher.model(X.to("sim:0"))
    known = distorch.stats(patcher.model, wait=False)
    whole = distorch.stats(patcher.model)
    assert known.fetches == whole.fetches > 0
    assert known.stall_seconds < whole.stall_seconds
    assert distorch.stats(patcher.model, wait=False) == whole
    y.cpu()

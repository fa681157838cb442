"""Several models: names, what is loaded when, what leaves."""

import gc
import threading
import time
import weakref

import pytest

from hub_stub import StubHub, set_endpoint, settle
from mlx_drift import DriftError
from mlx_drift.files.hub import resolve
from mlx_drift.serve.disk import DiskStore
from mlx_drift.serve.models import Known, Models, NotServed, weight_bytes
from mlx_drift.serve.request import Ended
from serving import PATIENCE, ask, engine, fetch, loaded, post, said, server
from tiny import plain_greedy, tiny_drafter, tiny_llama


def known(name, loads, weights=0):
    def load():
        loads.append(name)
        model = tiny_llama()
        return loaded(model, tiny_drafter(model))

    return Known(name, load, lambda: weights, frozenset({name, f"owner/{name}"}))


def test_names():
    with engine() as running:
        loads = []
        models = Models(
            running, [known("a", loads), known("b", loads)], patterns=["claude-*"], memory=1 << 40
        )
        for name, found in {"a": "a", "owner/b": "b", None: "a", "default_model": "a"}.items():
            assert models.find(name).name == found
        assert models.find("claude-opus").name == "a"
        first = models.get(models.known[0]).result()
        for name in ("gpt-5", "claude", "../a", "A", "/tmp"):
            with pytest.raises(NotServed, match="not served"):
                models.find(name)
        assert models.get(models.known[0]).result() is first  # nothing was dropped
        assert loads == ["a"]


def test_one_stays_until_memory_asks():
    with engine() as running:
        loads = []
        a, b = known("a", loads), known("b", loads, weights=600)
        models = Models(running, [a, b], memory=1 << 40)
        first = models.get(a).result()
        second = models.get(b).result()
        assert a.loaded is first
        for model in (first, second):
            heard, _ = ask(running, model, [1, 2, 3])
            heard.wait()
            assert heard.tokens == plain_greedy(model.model, [1, 2, 3], 12)
        b.loaded = None
        b.weights = lambda: 1 << 39
        models.memory = 1 << 39
        with pytest.raises(DriftError, match="more than the machine's"):
            models.get(b).result()
        assert a.loaded is None  # what could be given up was
        assert not len(running.store) or all(e.model is not first for e in running.store._entries)


def test_answers_go_on_while_a_model_is_loaded():
    with engine() as running:
        a, b = known("a", []), known("b", [])
        models = Models(running, [a, b], memory=1 << 40)
        first = models.get(a).result()
        let_go, load = threading.Event(), b.load

        def slowly():
            assert let_go.wait(PATIENCE)
            return load()

        b.load = slowly
        waiting = [models.get(b) for _ in range(3)]
        for prompt in ([1, 2, 3], [4, 5, 6]):
            heard, _ = ask(running, first, prompt)
            assert isinstance(heard.wait(), Ended)
            assert heard.tokens == plain_greedy(first.model, prompt, 12)
        assert models.is_loading
        assert not any(future.done() for future in waiting)
        let_go.set()
        assert {future.result(PATIENCE) for future in waiting} == {b.loaded}
        heard, _ = ask(running, b.loaded, [1, 2, 3])
        heard.wait()
        assert heard.tokens == plain_greedy(b.loaded.model, [1, 2, 3], 12)


def test_a_model_that_cannot_be_loaded_says_so_and_is_tried_again():
    with engine() as running:
        a = known("a", [])
        models = Models(running, [a], memory=1 << 40)
        load, a.load = a.load, lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            models.get(a).result(PATIENCE)
        a.load = load
        assert models.get(a).result(PATIENCE) is a.loaded
        assert not models.is_loading


def test_who_waits_for_a_load_that_fails_hears_of_it_without_another_try():
    with engine() as running:
        a, b = known("a", []), known("b", [])
        models = Models(running, [a, b], memory=1 << 40)
        let_go, tries = threading.Event(), []

        def fails():
            tries.append(let_go.wait(PATIENCE))
            return 1 / 0

        a.load = fails
        first = models.get(a)
        others = [models.get(one) for one in (a, b, a, b)]
        let_go.set()
        for future in (first, others[0], others[2]):
            with pytest.raises(ZeroDivisionError):
                future.result(PATIENCE)
        assert {others[1].result(PATIENCE), others[3].result(PATIENCE)} == {b.loaded}
        assert tries == [True]


def test_who_answers_is_not_unloaded():
    with engine() as running:
        loads = []
        a, b = known("a", loads), known("b", loads, weights=1 << 39)
        models = Models(running, [a, b], memory=1 << 39)
        first = models.get(a).result()
        heard, ticket = ask(running, first, [1, 2, 3], 100_000)
        while not heard.events:
            time.sleep(0.01)
        with pytest.raises(DriftError):
            models.get(b).result()
        assert a.loaded is first
        running.cancel([ticket])
        heard.wait()


def test_idle_models_are_unloaded_and_loaded_again():
    with engine() as running:
        loads = []
        models = Models(running, [known("a", loads)], memory=1 << 40, idle_seconds=0.05)
        running.when_idle = models.unload_idle
        models.get(models.known[0]).result()
        deadline = time.monotonic() + 60
        while models.known[0].loaded is not None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert models.get(models.known[0]).result() is not None
        assert loads == ["a", "a"]


@pytest.mark.parametrize("has_disk", [False, True])
def test_what_is_unloaded_is_gone_from_memory(tmp_path, has_disk):
    disk = DiskStore(tmp_path / "caches", 1 << 30) if has_disk else None
    with engine(disk=disk) as running:
        a, b = known("a", []), known("b", [], weights=1 << 39)
        models = Models(running, [a, b], memory=1 << 39)
        kept = weakref.ref(models.get(a).result())
        heard, _ = ask(running, kept(), [1, 2, 3])
        heard.wait()
        running.call(lambda: models._unload(a)).result()
        del heard, _
        deadline = time.monotonic() + PATIENCE
        while kept() is not None:  # the engine's last turn is forgotten at its next look around
            assert time.monotonic() < deadline, gc.get_referrers(kept())
            time.sleep(0.05)


def test_the_default_model_leaves_memory_too():
    def bytes_in_use(running):
        metrics = fetch(f"{running.root}/metrics").body.decode().splitlines()
        (line,) = (x for x in metrics if x.startswith("mlx_drift_device_memory_bytes "))
        return float(line.split()[1])

    with server("--idle-unload", "0.03") as running:
        assert post(f"{running.url}/chat/completions", said("a", max_tokens=1)).status == 200
        deadline = time.monotonic() + PATIENCE
        while (left := bytes_in_use(running)) > 1 << 20:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert post(f"{running.url}/chat/completions", said("a", max_tokens=1)).status == 200


def test_weights_in_the_hubs_cache_count(tmp_path, monkeypatch):
    settle(monkeypatch, tmp_path / "home")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    with StubHub(folder, "owner/name").serve() as hub:
        set_endpoint(monkeypatch, hub.endpoint)
        assert weight_bytes("owner/name") == 0  # they are not here yet
        resolve("owner/name", "model", None, ["*"])
        assert weight_bytes("owner/name") == 1000
    assert weight_bytes(str(folder)) == 1000


def test_the_hub_is_not_asked_on_the_devices_thread():
    with engine() as running:
        threads = []
        a = known("a", [])
        a.weights = lambda: threads.append(threading.current_thread().name) or 0
        Models(running, [a], memory=1 << 40).get(a).result()
        assert threads == ["loading"]

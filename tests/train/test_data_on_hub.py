"""What heads learn from, on a Hub: a data set as mlx_lm.lora takes it, or one of its files."""

import json

import pytest

from hub_stub import StubHub, set_endpoint, settle
from mlx_drift import DriftError
from mlx_drift.train.conversations import read_data

REPO = "someone/talks"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    settle(monkeypatch, tmp_path / "home")
    folder = tmp_path / "repo"
    folder.mkdir()
    with StubHub(folder, REPO).serve() as hub:
        set_endpoint(monkeypatch, hub.endpoint)
        yield hub


def write(hub, name, *asked):
    lines = [json.dumps({"turns": [question]}) for question in asked]
    (hub.folder / name).write_text("\n".join(lines))


def asked(conversations):
    return [one.messages[0]["content"] for one in conversations]


def test_a_data_set_and_its_parts(hub):
    write(hub, "train.jsonl", "a", "b")
    write(hub, "test.jsonl", "c")
    data = read_data(REPO)
    assert sorted(asked(data.train) + asked(data.valid)) == ["a", "b"]  # one is held out
    assert asked(data.test) == ["c"]
    write(hub, "valid.jsonl", "d")
    data = read_data(REPO)
    assert (asked(data.train), asked(data.valid)) == (["a", "b"], ["d"])


def test_it_is_read_from_the_cache_without_a_network(hub, monkeypatch):
    for name in ("train", "valid", "test"):
        write(hub, f"{name}.jsonl", name)
    before = read_data(REPO)
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert read_data(REPO) == before


def test_one_file_of_a_data_set(hub):
    write(hub, "more.jsonl", "a", "b", "c")
    assert len(read_data(f"{REPO}:more.jsonl").train) == 2


def test_what_is_not_there_is_told_in_one_line(hub):
    with pytest.raises(DriftError, match=r"^someone/talks:train\.jsonl"):
        read_data(REPO)
    with pytest.raises(DriftError, match="someone/nothing"):
        read_data("someone/nothing")

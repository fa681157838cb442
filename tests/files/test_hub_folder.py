"""A folder of a repository on the Hub: found, pinned, downloaded, read in place, uploaded."""

import errno
import math
import re
from pathlib import Path

import pytest
from huggingface_hub import constants, utils

from hub_stub import COMMIT, WRITER, StubHub, set_endpoint, settle
from mlx_drift.errors import DriftError
from mlx_drift.files.hub import (
    dataset_file,
    find_hub_folder,
    resolve,
    split_repository,
    upload_folder,
)

REPO = "someone/tiny-eagle3"
WEIGHTS = bytes(range(256)) * 4096  # a megabyte, so that reading a little of it shows


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    settle(monkeypatch, tmp_path)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # only whole chunks are kept
    yield
    utils.close_session()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "repo"
    for place in (folder, folder / "heads" / "v1"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.json").write_text("{}")
        (place / "model.safetensors").write_bytes(WEIGHTS)
        (place / "modeling.py").write_text("raise SystemExit('code from the Hub was run')")
    with StubHub(folder, REPO, ("main", "v2")).serve() as hub:
        set_endpoint(monkeypatch, hub.endpoint)
        yield hub


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refusal(call, *arguments):
    with pytest.raises(DriftError) as caught:
        call(*arguments)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("owner/name", ("owner/name", "")),
        ("owner/name.v1-x", ("owner/name.v1-x", "")),
        ("owner/name/sub", ("owner/name", "sub")),
        ("owner/name/a/b_1+x", ("owner/name", "a/b_1+x")),
    ],
)
def test_names_of_repositories(text, parts):
    assert split_repository(text) == parts


NO_NAMES = """
    name owner/ /name owner//name owner/name/ owner/name//x ./owner/name ../x/y owner/../name
    owner/name/.. owner/name/.hidden ~/owner/name owner\\name owner/na--me owner/name.git
    owner/name?x owner/näme owner/name/a:b owner/-name
"""


@pytest.mark.parametrize("text", [*NO_NAMES.split(), "", "owner/na me", "owner/name\n"])
def test_what_cannot_be_a_repository(text):
    assert split_repository(text) is None


@pytest.mark.parametrize("path", ["train--00.jsonl", "data/train..v2.jsonl", "a/b/c.json"])
def test_files_of_a_data_set(path, offline):
    offline()
    assert "HF_HUB_OFFLINE is set" in refusal(dataset_file, "someone/asked", path, None, 100)


@pytest.mark.parametrize("path", ["../x.jsonl", "a/../x", ".git/config", "/etc/passwd", "a//b", ""])
def test_what_cannot_be_a_file_of_a_data_set(path):
    line = refusal(dataset_file, "someone/asked", path, None, 100)
    assert "expected a file of a data set" in line


def test_a_folder_of_an_odd_name_is_not_asked_for(hub):
    folder = find_hub_folder(REPO, None, "drafter")
    asked = len(hub.asked)
    assert not folder.inner("../heads").files
    assert len(hub.asked) == asked


def test_one_request_finds_and_pins(hub):
    found = find_hub_folder(REPO, "v2", "drafter")
    assert (found.repo, found.subfolder, found.commit) == (REPO, "", COMMIT)
    assert found.files == {"config.json", "model.safetensors"}
    assert hub.asked == [f"/api/models/{REPO}/revision/v2"]


@pytest.mark.parametrize("subfolder", ["", "heads/v1"])
def test_downloads_once_and_at_the_commit(hub, subfolder):
    found = find_hub_folder(f"{REPO}/{subfolder}".rstrip("/"), None, "drafter")
    assert found.subfolder == subfolder
    before = len(hub.asked)
    assert found.path("model.safetensors").read_bytes() == WEIGHTS
    asked = hub.asked[before:]
    assert asked
    assert set(asked) == {
        f"/{REPO}/resolve/{COMMIT}/{subfolder}/model.safetensors".replace("//", "/")
    }
    assert found.path("model.safetensors").read_bytes() == WEIGHTS
    assert len(hub.asked) == before + len(asked)  # the second time nothing was asked


@pytest.mark.parametrize("revision", [None, "v2", COMMIT])
@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "unreachable", "down"])
def test_works_from_the_cache(hub, offline, monkeypatch, revision, how):
    path = find_hub_folder(f"{REPO}/heads/v1", revision, "drafter").path("config.json")
    asked = len(hub.asked)
    if how == "HF_HUB_OFFLINE":
        offline()
    elif how == "unreachable":
        set_endpoint(monkeypatch, "http://127.0.0.1:9")
    else:
        hub.status = 503
    found = find_hub_folder(f"{REPO}/heads/v1", revision, "drafter")
    assert found.commit == COMMIT
    assert found.files == {"config.json"}  # the rest is not there
    assert found.path("config.json") == path
    assert found.size("config.json") == 2
    assert found.read_at("config.json")(1, 9) == b"}"
    assert len(hub.asked) <= asked + (how == "down")


def test_what_cannot_be_found(hub, offline, monkeypatch):
    def find(text=REPO, revision=None):
        return refusal(find_hub_folder, text, revision, "drafter")

    assert find("nothing").startswith("nothing: no such folder. Expected the folder of a drafter")
    assert find("a/b").startswith("a/b: no such folder here and no such repository on the Hub")
    assert find(revision="v3") == f"{REPO}: the Hub has no revision 'v3' of it"
    assert find(f"{REPO}/heads").startswith(f"{REPO}/heads: {REPO} has no files in a folder heads")
    hub.status = 500
    assert find() == f"{REPO}: the Hub at {hub.endpoint} answered with HTTP 500; try again later"
    hub.status = 401
    assert "does not let you read it (HTTP 401): log in with `hf auth login`" in find()
    hub.status = 200  # an empty JSON object: not what a Hub would say
    assert "gave no usable answer" in find()
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert "neither here nor in the local cache, and the Hub at http://127.0.0.1:9 can" in find()
    offline()
    assert "neither here nor in the local cache, and HF_HUB_OFFLINE is set" in find()


def test_a_folder_that_is_not_in_the_cache(hub, offline):
    find_hub_folder(REPO, None, "drafter").path("config.json")
    offline()
    line = refusal(find_hub_folder, f"{REPO}/heads/v1", None, "drafter")
    assert "neither here nor in the local cache" in line


def test_a_hub_that_is_gone_after_the_listing(hub, monkeypatch):
    found = find_hub_folder(REPO, None, "drafter")
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    for call in (found.path, found.size, lambda name: found.read_at(name)(0, 1)):
        line = refusal(call, "config.json")
        assert line.startswith(f"{REPO}/config.json: it is neither here nor in the local cache")
        assert "cannot be reached" in line


def test_gated_files(hub):
    hub.gated = True
    found = find_hub_folder(REPO, None, "drafter")
    name = "model.safetensors"
    for call in (found.path, found.size, lambda name: found.read_at(name)(0, 1)):
        line = refusal(call, name)
        terms = f"accept the terms at {hub.endpoint}/{REPO}, then log in with `hf auth login`"
        assert line == f"{REPO}/{name}: it is gated: {terms}"


def test_only_listed_names_and_never_code_are_asked_for(hub):
    hostile = (
        "../x.bin",
        "/etc/x",
        "a\\b.bin",
        "x\n.bin",
        "\x1b[2J",
        "..",
        "",
        "x\u202e.bin",
        "X.PY",
    )
    hub.lists_also = (*hostile, "gone.bin")
    found = find_hub_folder(REPO, None, "drafter")
    assert found.files == {"config.json", "model.safetensors", "gone.bin"}
    asked = len(hub.asked)
    for name in (*hostile, "modeling.py", "heads/v1/config.json", "absent.bin"):
        for call in (found.path, found.size, found.read_at):
            assert "no such file at commit" in refusal(call, name)
    assert len(hub.asked) == asked
    for call in (found.path, found.size, lambda name: found.read_at(name)(0, 1)):
        assert refusal(call, "gone.bin") == f"{REPO}/gone.bin: the Hub has no such file"


def test_reads_only_the_bytes_asked_for(hub):
    read = find_hub_folder(REPO, None, "drafter").read_at("model.safetensors")
    size = len(WEIGHTS)
    for offset, count in [(0, 8), (1000, 5000), (size - 3, 10), (size, 4), (size + 9, 4), (7, 0)]:
        assert read(offset, count) == WEIGHTS[offset : offset + count]
    fetched = [request for request in hub.requests if request.range]
    assert [request.range for request in fetched][:2] == ["bytes=0-7", "bytes=1000-5999"]
    assert len(fetched) == 5
    assert all(f"/resolve/{COMMIT}/" in request.path for request in fetched)
    assert not Path(constants.HF_HUB_CACHE).exists()  # nothing is stored, not even what main is


def test_size_takes_no_download(hub):
    found = find_hub_folder(REPO, None, "drafter")
    hub.requests.clear()
    assert found.size("model.safetensors") == len(WEIGHTS)
    assert [request.method for request in hub.requests] == ["HEAD"]


def test_a_server_that_sends_something_else(hub):
    read = find_hub_folder(REPO, None, "drafter").read_at("model.safetensors")
    hub.surplus = b"more"
    assert "it did not send the bytes that were asked for" in refusal(read, 0, 8)
    hub.ranges = False
    assert "it does not send parts of files" in refusal(read, 0, 8)


def test_a_part_that_breaks_off(hub):
    read = find_hub_folder(REPO, None, "drafter").read_at("model.safetensors")
    hub.breaks = 1
    assert "broke off" in refusal(read, 0, 8)
    assert read(0, 8) == WEIGHTS[:8]


@pytest.mark.parametrize("on_second_host", ["", ".safetensors"])
def test_an_interrupted_download_resumes_by_itself(hub, on_second_host):
    hub.breaks, hub.on_second_host = 1, on_second_host
    path = find_hub_folder(REPO, None, "drafter").path("model.safetensors")
    assert path.read_bytes() == WEIGHTS
    ranges = [request.range for request in hub.requests if request.method == "GET"]
    assert ranges[-2:] == [None, f"bytes={len(WEIGHTS) // 2}-"]


def test_a_download_that_stays_interrupted(hub):
    found = find_hub_folder(REPO, None, "drafter")
    config = found.path("config.json")
    hub.breaks = math.inf
    line = refusal(found.path, "model.safetensors")
    assert line.startswith(f"{REPO}/model.safetensors: the connection to the Hub")
    assert "broke off" in line
    assert "run it again" in line
    assert config.is_file()
    hub.breaks = 0
    assert found.path("model.safetensors").read_bytes() == WEIGHTS


def test_the_token_goes_to_the_endpoint_only(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.on_second_host = ".safetensors"
    found = find_hub_folder(REPO, None, "drafter")
    assert found.size("model.safetensors") == len(WEIGHTS)
    assert found.read_at("model.safetensors")(1, 3) == WEIGHTS[1:4]
    assert found.path("model.safetensors").read_bytes() == WEIGHTS
    here = [request for request in hub.requests if request.host == hub.endpoint]
    there = [request for request in hub.requests if request.host == hub.second_host]
    assert {request.authorization for request in here} == {"Bearer hf_secret"}
    assert [request.range for request in there] == ["bytes=1-3", None]
    assert {request.authorization for request in there} == {None}


def test_a_disk_that_is_full(hub, monkeypatch):
    found = find_hub_folder(REPO, None, "drafter")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/cache")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    line = refusal(found.path, "model.safetensors")
    assert "No space left on device (/somewhere/cache): make room" in line
    assert "HF_HOME" in line


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "cache").write_text("a file where the cache should be")
    found = find_hub_folder(REPO, None, "drafter")  # needs no cache
    assert found.read_at("model.safetensors")(0, 2) == WEIGHTS[:2]
    assert re.search(r"(exists|Not a directory) \(.*HF_HOME", refusal(found.path, "config.json"))


def test_resolve_says_the_same(hub, offline, tmp_path):
    def resolved(text=REPO, revision=None):
        return refusal(resolve, text, "model", revision, ["config.json"])

    assert (resolve(REPO, "model", "v2", ["config.json"]) / "config.json").is_file()
    assert not any(path.endswith(".py") for path in hub.asked)
    assert resolved(f"{REPO}/heads").startswith(
        f"{REPO}/heads: no such folder. Expected the folder"
    )
    assert resolved(str(hub.folder / "config.json")).endswith("expected the folder of a model")
    assert resolved("a/b").startswith("a/b: no such folder here and no such repository on the Hub")
    assert resolved(revision="v3") == f"{REPO}: the Hub has no revision 'v3' of it"
    hub.gated = True
    assert "it is gated: accept the terms" in refusal(
        resolve, REPO, "model", None, ["model.safetensors"]
    )
    offline()
    assert "HF_HUB_OFFLINE is set" in resolved("a/b")


def test_uploads(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", WRITER.removeprefix("Bearer "))
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlibrary_name: mlx\n---\n# A drafter\n")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    for repo in ("someone/new", REPO):  # one to create, one that is there
        hub.committed.clear()
        assert upload_folder(folder, repo) == f"{hub.endpoint}/{repo}"
        assert hub.committed == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_uploads_that_are_refused(hub, monkeypatch, offline, tmp_path):
    def upload(repo="someone/new"):
        return refusal(upload_folder, tmp_path, repo)

    assert upload("name") == "name: expected a Hub repository as owner/name to upload to"
    assert upload("someone/new/sub").startswith("someone/new/sub: expected")
    line = upload()
    assert "does not let you write it (HTTP 401: Invalid username or password.): log in" in line
    monkeypatch.setenv("HF_TOKEN", WRITER.removeprefix("Bearer "))
    hub.status = 403
    assert "does not let you write it (HTTP 403): log in" in upload()
    offline()
    assert upload() == "someone/new: HF_HUB_OFFLINE is set: check the name, or go online"
    assert not hub.committed

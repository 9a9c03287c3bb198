"""Fetching a SAM 2 checkpoint, against a hub on this machine that hands it out as a hub does large files."""

import hashlib
import os
import time
from functools import partial

import huggingface_hub
import pytest
from hub_server import HubServer

from decaf.errors import DecafError
from decaf.sam2 import PUBLISHED, download_checkpoint

REPO = "facebook/sam2.1-hiera-tiny"
NAME = PUBLISHED[REPO]
SIZE = 32 << 20  # several of the pieces in which the hub's library writes


@pytest.fixture
def hub(tmp_path, monkeypatch):
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / NAME).write_bytes(os.urandom(SIZE))
    server = HubServer({REPO: folder}, large=(".pt",))
    monkeypatch.setattr(huggingface_hub, "hf_hub_url", partial(huggingface_hub.hf_hub_url, endpoint=server.url))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    yield server
    server.close()


class Stop(BaseException):
    pass


def fetch(hub, tmp_path, most=1 << 60):
    """{"file"}, {"error"} or {"stopped": seconds until it did}; and "seen", the progress while it was fetched. Stops beyond `most` bytes."""
    seen, asked, result = [], [], {}

    def progress(done, total, what):
        if what.startswith("Downloading"):
            seen.append((done, total, what))
        if done > most:
            asked.append(time.perf_counter())
            raise Stop

    try:
        result["file"] = str(download_checkpoint(REPO, tmp_path / "sam2", progress))
    except Stop:
        result["stopped"] = time.perf_counter() - asked[0]
    except DecafError as error:
        result["error"] = str(error)
    return result | {"seen": seen}


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def left(tmp_path):
    return sorted(file.name for file in (tmp_path / "sam2").iterdir())


def test_it_comes_whole_and_once(hub, tmp_path):
    result = fetch(hub, tmp_path)
    assert result["file"] == str(tmp_path / "sam2" / NAME) and left(tmp_path) == [NAME]
    assert digest(tmp_path / "sam2" / NAME) == digest(hub.repositories[REPO] / NAME)
    assert result["seen"][-1] == (SIZE, SIZE, f"Downloading {NAME}")
    hub.requests.clear()
    assert fetch(hub, tmp_path)["file"] == result["file"]
    assert hub.requests == [], "a file that is there is not asked for again"


def test_cancel_stops_it_and_it_goes_on_from_there(hub, tmp_path):
    hub.delay = 0.01
    first = fetch(hub, tmp_path, most=SIZE // 4)
    assert first["stopped"] < 1
    (part,) = left(tmp_path)
    assert part.endswith(".part"), "nothing that looks like a checkpoint"
    kept = (tmp_path / "sam2" / part).stat().st_size
    assert SIZE // 4 < kept < SIZE
    hub.delay = 0
    hub.ranges.clear()
    fetch(hub, tmp_path)
    assert f"bytes={kept}-" in hub.ranges, hub.ranges
    assert left(tmp_path) == [NAME] and digest(tmp_path / "sam2" / NAME) == digest(hub.repositories[REPO] / NAME)


def test_cancel_does_not_wait_for_a_server_that_is_silent(hub, tmp_path):
    hub.delay = 3.0  # for every 64 KB: the first piece of several MB would take minutes
    result = fetch(hub, tmp_path, most=-1)
    assert result["stopped"] < 1


def test_what_was_kept_of_another_version_is_not_gone_on_with(hub, tmp_path):
    hub.delay = 0.01
    fetch(hub, tmp_path, most=SIZE // 4)
    hub.delay = 0
    (hub.repositories[REPO] / NAME).write_bytes(os.urandom(SIZE))
    fetch(hub, tmp_path)
    assert digest(tmp_path / "sam2" / NAME) == digest(hub.repositories[REPO] / NAME)


def test_a_damaged_file_is_thrown_away(hub, tmp_path):
    hub.harm = lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
    assert "damaged" in fetch(hub, tmp_path)["error"]
    assert left(tmp_path) == []
    hub.harm = lambda data: data
    assert "file" in fetch(hub, tmp_path)


def test_without_a_connection_it_says_what_to_do(hub, tmp_path):
    hub.close()
    message = fetch(hub, tmp_path)["error"]
    assert NAME in message and str(tmp_path / "sam2") in message and "by hand" in message and "\n" not in message
    assert left(tmp_path) == []


def test_a_repository_without_the_file(hub, tmp_path):
    (hub.repositories[REPO] / NAME).unlink()
    assert NAME in fetch(hub, tmp_path)["error"] and left(tmp_path) == []

"""Prompts spoilt by chance on the real server: each is answered in a sentence, none leaves a trace in the next one.

60 of them by default, 300 with --long. SEED and the number of a prompt give the prompt.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from comfy_fuzz import spoilt
from comfy_graph import whole_graph
from comfy_host import PACK, Server
from PIL import Image

pytestmark = pytest.mark.slow

SEED = 20240
MOST_MEMORY = 3 << 30
OURS = (str(PACK), "custom_nodes/ComfyUI-DecAF", "custom_nodes\\ComfyUI-DecAF")
LED_TO = "The above exception was the direct cause", "During handling of the above exception"


GRAPHS = whole_graph(["clip", 0]), whole_graph(["video", 0])


class HostFell(Exception):
    """ComfyUI's own thread for prompts has ended, by no fault of the pack: it answers nothing any more."""


@pytest.fixture
def servers(host, base):
    """servers() -> a fresh server that no other test uses, instead of the one before."""
    with contextlib.ExitStack() as stack:

        def fresh() -> Server:
            stack.pop_all().close()
            return stack.enter_context(Server(host, base))

        yield fresh


def test_spoilt_prompts_are_answered_and_leave_nothing_behind(servers, request):
    server = servers()
    listed = server.get("/object_info").items()
    ours = {name for name, told in listed if told["python_module"].startswith("custom_nodes.ComfyUI-DecAF")}
    assert ours and ours <= {one["class_type"] for one in GRAPHS[0].values()}, "every node is in the graph"
    before = [masks(server, graph) for graph in GRAPHS]
    problems, ended = [], {"refused": 0, "refused in part": 0, "failed": 0, "success": 0, "host fell": 0}
    for number in range(300 if request.config.getoption("--long") else 60):
        random = Random(f"{SEED} {number}")
        text, done = spoilt(random, random.choice(GRAPHS), lambda kind: isinstance(kind, str) and kind in ours)
        start = time.monotonic()
        try:
            answer, state = answered(server, text)
        except HostFell:
            problems += [f"in the log: {block}" for block in our_tracebacks(server.log)]
            assert peak_memory(server) < MOST_MEMORY, f"{number} {done}"
            server = servers()
            ended["host fell"] += 1
            continue
        except (AssertionError, OSError) as error:  # no answer in time, or the connection was cut
            problems.append(f"{number} {done}: {type(error).__name__}: {error}"[:1500])
            server = servers()
            continue
        ended[state] += 1
        problems += [f"{number} {done}: {what}" for what in wrong_with(answer)]
        if time.monotonic() - start > 30:
            problems.append(f"{number} {done}: took {time.monotonic() - start:.0f} s")
    problems += [f"in the log: {block}" for block in our_tracebacks(server.log)]
    print(ended, f"peak {peak_memory(server) / 2**20:.0f} MB")
    assert not problems, "\n\n".join(problems)
    assert all(ended[kind] for kind in ended if kind != "host fell"), f"a kind of answer did not come: {ended}"
    assert ended["host fell"] < sum(ended.values()) / 10, f"too few prompts were answered to tell: {ended}"
    queue = server.get("/queue")
    assert not queue["queue_running"] and not queue["queue_pending"], "a prompt is stuck"
    assert peak_memory(server) < MOST_MEMORY
    server.post("/free", {"unload_models": True, "free_memory": True})
    for graph, mask in zip(GRAPHS, before, strict=True):
        assert np.array_equal(masks(server, graph), mask), "the clean prompt gives other masks than before"


def masks(server: Server, graph: dict) -> np.ndarray:
    """(T, H, W, 3): the masks that the clean graph shows, made anew."""
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(1.5)  # it is carried out by the worker, between prompts
    files = server.run(graph)["mask"]["images"]
    return np.stack([np.asarray(Image.open(server.base / one["type"] / one["subfolder"] / one["filename"])) for one in files])


def answered(server: Server, text: str) -> tuple[dict, str]:
    """What the server says in the end: its answer to the post, or the history of the prompt."""
    answer = server.post("/prompt", text)
    if "prompt_id" not in answer:
        return answer, "refused"
    end = time.monotonic() + 60
    while not (history := server.get(f"/history/{answer['prompt_id']}")):
        if "(prompt_worker)" in server.log:
            raise HostFell
        assert time.monotonic() < end, f"no end in 60 s:\n{server.log[-2000:]}"
        time.sleep(0.05)
    entry = history[answer["prompt_id"]]
    entry["node_errors"] = answer.get("node_errors", {})
    whole = not entry["node_errors"]  # ComfyUI runs the branches that it does not refuse
    return entry, "failed" if entry["status"]["status_str"] != "success" else "success" if whole else "refused in part"


def wrong_with(answer: dict) -> list[str]:
    """What there is to complain of: an error without a sentence, or one that is not meant for people and came out of this pack."""
    found = []
    for name, errors in (answer.get("node_errors") or {}).items():
        for error in errors["errors"]:
            if not error["message"]:
                found.append(f"an error without a message at {name}")
            if any(is_our_file(line) for line in error.get("extra_info", {}).get("traceback") or []):
                found.append(f"while the prompt was checked: {error}"[:2000])
    for kind, data in answer.get("status", {}).get("messages", []) if isinstance(answer.get("status"), dict) else []:
        if kind != "execution_error":
            continue
        if not data["exception_message"].strip() or not data["node_id"]:
            found.append(f"an error without a message or a node: {data}"[:1000])
        if any(is_our_file(line) for line in data["traceback"]) and not data["exception_type"].endswith("DecafError"):
            found.append(f"{data['exception_type']}: {data['exception_message'][:300]}\n{''.join(data['traceback'])}")
    return found


def is_our_file(line: str) -> bool:
    return any(place in line for place in OURS)


def our_tracebacks(log: str) -> list[str]:
    """Tracebacks in a log that go through this pack and do not end in a DecafError. One that has led to another counts with that one."""
    found = []
    for block in log.split("Traceback (most recent call last):\n")[1:]:
        lines = block.splitlines()
        frames = list(itertools.takewhile(lambda line: line.startswith("  "), lines))
        error = "".join(lines[len(frames) : len(frames) + 1])
        led_to_another = any(line.startswith(LED_TO) for line in lines[len(frames) :])
        if any(is_our_file(line) for line in frames) and "DecafError" not in error and not led_to_another:
            found.append("\n".join([*frames[-12:], error]))
    return found


def peak_memory(server: Server) -> int:
    """Bytes of RAM that the server has held at most; 0 where the system does not tell."""
    status = Path(f"/proc/{server.process.pid}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) << 10 if found else 0


def test_the_watch_on_the_answers_sees_what_it_shall_see():
    ours, theirs = f'  File "{PACK}/nodes/host.py", line 1, in load\n', '  File "/comfy/execution.py", line 1, in execute\n'

    def failed(kind: str, frame: str, said: str = "no") -> dict:
        data = {"exception_type": kind, "exception_message": said, "traceback": [theirs, frame], "node_id": "1"}
        return {"status": {"status_str": "error", "messages": [["execution_error", data]]}}

    assert wrong_with(failed("TypeError", ours)) and wrong_with(failed("pack.DecafError", ours, " \n"))
    assert not wrong_with(failed("pack.decaf.errors.DecafError", ours)) and not wrong_with(failed("KeyError", theirs))
    refused = {"node_errors": {"1": {"errors": [{"message": "Exception", "extra_info": {"traceback": [theirs, ours]}}]}}}
    assert wrong_with(refused)
    head = "Traceback (most recent call last):\n"
    assert our_tracebacks(f"{head}{theirs}{ours}TypeError: no\n") and not our_tracebacks(f"{head}{theirs}KeyError: 1\n")
    assert len(our_tracebacks(f"{head}{ours}KeyError: 1\n[INFO] a DecafError\n{head}{theirs}KeyError: 2\n")) == 1
    cause = "\nThe above exception was the direct cause of the following exception:\n\n"
    assert not our_tracebacks(f"{head}{theirs}pack.DecafError: a sentence\n")
    assert not our_tracebacks(f"{head}{theirs}{ours}KeyError: 1\n{cause}{head}{theirs}{ours}pack.decaf.errors.DecafError: a sentence\n")

"""What the real server answers to single mistakes in a prompt: how many errors, at which node, in which words."""

from __future__ import annotations

import pytest
from comfy_graph import whole_graph

pytestmark = pytest.mark.slow


def errors_of(server, **changes) -> dict[str, list[str]]:
    """Node -> "type: input" of its errors when the prompt is checked. `changes`: node__input=value, ... to leave the input out."""
    answer = server.post("/prompt", {"prompt": changed(**changes)})
    found = {node: [f"{one['type']}: {one['details']}" for one in of["errors"]] for node, of in answer["node_errors"].items()}
    if "prompt_id" in answer:
        server.result(answer["prompt_id"])
    return found


def changed(**changes) -> dict:
    graph = whole_graph(["clip", 0])
    for place, value in changes.items():
        node, name = place.split("__")
        if value is ...:
            del graph[node]["inputs"][name]
        else:
            graph[node]["inputs"][name] = value
    return graph


def test_an_empty_query_is_one_error(server):
    found = errors_of(server, extract__query="  ")
    assert list(found) == ["extract"] and len(found["extract"]) == 1 and "query - The query is empty" in found["extract"][0], found


@pytest.mark.parametrize("place", ["mllm__model", "sam2__model", "extract__query", "extract__mllm", "propagate__sam2"])
def test_an_input_that_is_missing_is_one_error(server, place):
    node, name = place.split("__")
    assert errors_of(server, **{place: ...}) == {node: [f"required_input_missing: {name}"]}


def test_a_question_without_its_place_for_the_query_is_told_by_the_node(server):
    entry = server.result(server.queue(changed(extract__object_question="Where is it?")))
    (error,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    assert error["node_id"] == "extract" and "{query}" in error["exception_message"] and error["exception_type"].endswith("DecafError")


@pytest.mark.parametrize(
    "place, value", [("extract__mllm", 5), ("propagate__frames", "clip.mp4"), ("picked__tracks", {"a": 1}), ("fused__attention", None)]
)
def test_a_literal_on_a_socket_is_told_by_the_node(server, place, value):
    node, name = place.split("__")
    entry = server.result(server.queue(changed(**{place: value})))
    (error,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    assert error["node_id"] == node and f"'{name}'" in error["exception_message"] and "Connect" in error["exception_message"]
    assert error["exception_type"].endswith("DecafError")


def test_a_number_that_is_none_is_told_although_the_server_lets_it_pass(server):
    entry = server.result(server.queue(changed(propagate__nms_iou=float("nan"))))
    (error,) = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    assert error["node_id"] == "propagate" and "'nms_iou'" in error["exception_message"] and "from 0 to 1" in error["exception_message"]

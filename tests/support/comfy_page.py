"""ComfyUI's page in headless Chromium: what a person does there, as functions."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

DESIGNS = ("classic canvas", "Nodes 2.0")

IN_EACH_DESIGN = pytest.mark.parametrize("design", [pytest.param(DESIGNS[0], marks=pytest.mark.slow), DESIGNS[1]])
"""For tests of whole tasks in the page, which take long."""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def chromium() -> str | None:
    """The browser: Debian's, or what is called chromium or Chrome on this machine."""
    return next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


@contextmanager
def open_browser():
    """One at a time: Playwright's plain interface allows no second one beside it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def open_page(browser: Browser, url: str, size: tuple[int, int] = (2400, 1300), design: str = DESIGNS[0]):
    """A page that shows ComfyUI's canvas in one of `DESIGNS`, with nothing remembered from earlier ones."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.goto(url)
    _wait_for_app(page)
    # The server remembers it for the next page.
    page.evaluate("on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", design == DESIGNS[1])
    page.wait_for_timeout(500)
    yield page
    page.close()


def _wait_for_app(page: Page) -> None:
    page.wait_for_function("window.app?.graph && window.app.extensionManager && window.LiteGraph", timeout=60_000)
    page.get_by_test_id("queue-button").wait_for()
    page.wait_for_timeout(1000)


def load_workflow(page: Page, file: Path) -> None:
    """Menu, Open, and choose the file."""
    with page.expect_file_chooser() as chooser:
        page.evaluate("window.app.extensionManager.command.execute('Comfy.OpenWorkflow')")
    chooser.value.set_files(file)
    count = len(json.loads(file.read_text())["nodes"])
    page.wait_for_function("count => window.app.graph._nodes.length === count", arg=count, timeout=20_000)
    page.wait_for_timeout(1000)


def set_widgets(page: Page, values: dict[str, dict[str, object]]) -> None:
    """Set widgets by node type, or title of a box, and widget name, the way choosing in the page does; also of nodes in boxes."""
    page.evaluate(
        """values => {
            const set = nodes => {
                for (const node of nodes) {
                    for (const [name, value] of Object.entries(values[node.subgraph ? node.title : node.type] ?? {})) {
                        const widget = node.widgets.find(widget => widget.name === name)
                        widget.value = value
                        widget.callback?.(value)
                    }
                    if (node.subgraph) set(node.subgraph.nodes)
                }
            }
            set(window.app.graph._nodes)
        }""",
        values,
    )


def press_run(page: Page, seconds: float = 180) -> list[str]:
    """Click Run and wait until the prompt has ended: what the page was told went wrong, "node type: message"."""
    page.evaluate(
        """() => {
            if (window.ended) return
            window.ended = {}
            const api = window.app.api
            api.addEventListener('execution_success', ({detail}) => window.ended[detail.prompt_id] = [])
            api.addEventListener('execution_error', ({detail}) =>
                window.ended[detail.prompt_id] = [detail.node_type + ': ' + detail.exception_message])
        }"""
    )
    with page.expect_response(lambda answer: answer.url.endswith("/prompt") and answer.request.method == "POST") as answer:
        page.get_by_test_id("queue-button").click()
    told = answer.value.json()
    refused = told.get("node_errors") or {}
    said = [f"{node['class_type']}: {error['details']}" for node in refused.values() for error in node["errors"]]
    if "prompt_id" not in told:
        return said
    # Where some nodes are refused, ComfyUI still runs the branches that do not need them.
    page.wait_for_function("id => window.ended[id]", arg=told["prompt_id"], timeout=seconds * 1000)
    page.wait_for_timeout(2000)  # previews are fetched after the end
    return said + page.evaluate("id => window.ended[id]", told["prompt_id"])


def fit_view(page: Page) -> None:
    """Show the whole graph."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(800)


def search_nodes(page: Page, words: str) -> list[str]:
    """What the page's node search lists for some words, from the top: titles."""
    found = page.get_by_placeholder("Add a node")
    if not found.is_visible():
        page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    found.fill(words)
    page.wait_for_timeout(1000)
    return [text.split("\n")[0] for text in page.get_by_test_id("result-item").all_inner_texts()]

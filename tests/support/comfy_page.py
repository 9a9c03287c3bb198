"""ComfyUI's page in headless Chromium: what a person does there, as functions."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def chromium() -> str | None:
    """The browser: Debian's, or what is called chromium or Chrome on this machine."""
    return next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


@contextmanager
def open_page(url: str, size: tuple[int, int] = (1600, 900)):
    """A page that shows ComfyUI's empty canvas, first-run dialog closed."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.goto(url)
        page.wait_for_function("window.app && window.app.graph && window.app.extensionManager && window.LiteGraph", timeout=60_000)
        page.wait_for_timeout(1500)
        page.keyboard.press("Escape")
        yield page
        browser.close()


def load_workflow(page: Page, file: Path) -> None:
    """Ctrl+O and choose the file."""
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Control+o")
    chooser.value.set_files(file)
    count = len(json.loads(file.read_text())["nodes"])
    page.wait_for_function("count => window.app.graph._nodes.length === count", arg=count, timeout=20_000)
    page.wait_for_timeout(500)


def set_widgets(page: Page, values: dict[str, dict[str, object]]) -> None:
    """Set widgets by node type and widget name, the way choosing in the page does."""
    page.evaluate(
        """values => {
            for (const node of window.app.graph._nodes)
                for (const [name, value] of Object.entries(values[node.type] ?? {})) {
                    const widget = node.widgets.find(widget => widget.name === name)
                    widget.value = value
                    widget.callback?.(value)
                }
        }""",
        values,
    )


def fit_view(page: Page) -> None:
    """Show the whole graph."""
    page.evaluate("window.app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(800)

"""What a node shows while it works, and what it says when it is done: a bar, the step in words, and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import comfy.model_management as mm
import comfy.utils
import numpy as np
import torch
from comfy_execution.utils import get_executing_context
from PIL import Image

from ..decaf.attention.fusion import min_max, smooth
from ..decaf.data import SAM2Prompts
from ..decaf.pictures.drawing import heat_overlay
from ..decaf.pictures.styles import show_objects
from ..decaf.report import Preview, Report

_BETWEEN_EVENTS = 0.1
_LONGEST_SILENCE = 1.0
"""Seconds between two events of the bar, at least and, as long as the work asks whether to go on, at most."""

_BETWEEN_PICTURES = 0.5
_SHARE_OF_PICTURES = 0.02
"""Seconds between two pictures, and the share of the time that they may take: after an expensive one the next waits longer."""

_SIDE = 384
"""Pixels of the longer side of a picture."""

_STEP = 64
"""Calls after which half of a unit is taken to be done: a pass of a model asks about this often whether to go on."""


class NodeReport(Report):
    """Shows on the node that is executed what it does, and stops it when the user has pressed Cancel. It can be called as a plain callback.

    The bar is that of a step, and its words are the name of the step. It is never full while the node works. Where a step asks whether to go on
    without having finished another unit, the bar creeps through that unit and does not reach its end.
    """

    def __init__(self):
        super().__init__(self._show, self._look)
        self._server = _server()
        self._node = _executing()
        self._stopped: BaseException | None = None
        self._step: tuple[int, int, str] = (0, 0, "")
        self._asked = 0
        self._next_event = self._next_picture = 0.0
        self._told = ""

    def __call__(self, done: int, total: int, what: str) -> None:
        self.progress(done, total, what)

    def _show(self, done: int, total: int, what: str) -> None:
        # ComfyUI tells of a Cancel once, but a download asks from several threads, each of which has to stop.
        if self._stopped is not None:
            raise self._stopped
        with self._stopping():
            mm.throw_exception_if_processing_interrupted()
        now, step = time.monotonic(), (done, total, what)
        if step == self._step:
            self._asked += 1
            due = now >= self._next_event - _BETWEEN_EVENTS + _LONGEST_SILENCE
        else:
            due = now >= self._next_event or what != self._step[2] or done >= total
            self._step, self._asked = step, 0
        if due:
            self._next_event = now + _BETWEEN_EVENTS
            self._say(_words(*step))
            self._move()

    def _move(self, picture: Image.Image | None = None) -> None:
        done, total, _ = self._step
        value = min(done + self._asked / (self._asked + _STEP), 0.99 * total)
        # A bar of its own for each event: ComfyUI's keeps back what is little more, or less, than what it has sent.
        bar = comfy.utils.ProgressBar(max(total, 1))
        with self._stopping():  # the bar looks for a Cancel as well
            bar.update_absolute(value, preview=None if picture is None else ("JPEG", picture, _SIDE))

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        try:
            yield
        except mm.InterruptProcessingException as cancel:
            self._stopped = cancel
            raise

    def _say(self, text: str) -> None:
        if text != self._told and self._server is not None and self._node is not None:
            self._told = text
            self._server.send_progress_text(text, self._node, self._server.client_id)

    def _look(self, make: Callable[[], Preview]) -> None:
        start = time.monotonic()
        if start < self._next_picture or self._server is None or self._server.client_id is None:
            return
        self._move(drawn(make()))
        now = time.monotonic()
        self._next_picture = now + max(_BETWEEN_PICTURES, (now - start) / _SHARE_OF_PICTURES)
        self._next_event = now + _BETWEEN_EVENTS


def drawn(preview: Preview) -> Image.Image:
    """The frame with its heat map or its objects, at most `_SIDE` pixels wide and high."""
    picture = Image.fromarray(preview.frame.numpy())
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.BILINEAR, reducing_gap=1.0)
    frame = torch.from_numpy(np.array(picture))
    if preview.heat is not None:
        shown = heat_overlay(frame, min_max(smooth(preview.heat[None], 3, 1.0))[0])
    else:
        shown = show_objects(frame, preview.masks)
    return Image.fromarray(shown.numpy())


def _words(done: int, total: int, what: str) -> str:
    """What is done, for example "Asking about the key frames: 4 of 16"."""
    if total <= 1:
        return what
    if total > 1_000_000:  # bytes
        return f"{what}: {done / total:.0%}"
    return f"{what}: {done} of {total}"


class Says:
    """What a node shows when it is done: `text`, if there is any, and what else it shows. A node that works through several queries shows the
    texts of all, so each has to say which it is of."""

    def __init__(self, text: str, shown=None):
        self._text, self._shown = text, shown

    def as_dict(self) -> dict:
        return {"text": [self._text] if self._text else [], **({} if self._shown is None else self._shown.as_dict())}


def named(query: str) -> str:
    """A query as it is written on a node."""
    return f'"{query.rstrip(".")}"'


def absent(prompts: SAM2Prompts) -> str:
    """Says of the query, if its object was judged not to be in the clip, just that."""
    if not prompts.message or prompts.fused.presence is None:
        return ""
    return f"{named(prompts.fused.query)} is not in this clip: presence {prompts.fused.presence:.2f}"


def _server():
    """ComfyUI's server, None where nodes are run without one."""
    with suppress(ImportError):
        from server import PromptServer

        return getattr(PromptServer, "instance", None)
    return None


def _executing() -> str | None:
    context = get_executing_context()
    return None if context is None else context.node_id

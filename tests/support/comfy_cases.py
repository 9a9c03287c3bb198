"""Runs named cases in another Python, one after the other, and tells of each as it ends. What hangs or crashes is that one case."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path


class Cases:
    """`command` plus the path of a JSON file with `settings` and the names still to run as "cases" prints a JSON line {"begin": name} before
    and {"case": name, "error": text or null} after each. `limit`: seconds that a case may take; `start`: that the process may take to begin.
    """

    def __init__(
        self, command: Sequence[str], names: Sequence[str], settings: dict, folder: Path, *, env=None, limit: float = 90, start: float = 180
    ):
        self._command, self._settings, self._folder, self._env = [str(part) for part in command], settings, folder, env
        self._limit, self._start = limit, start
        self._left = list(names)
        self._errors: dict[str, str | None] = {}
        self._process = None

    def error(self, name: str) -> str | None:
        """What went wrong in the case `name`; None if nothing did. Waits until it has run."""
        while name not in self._errors:
            if self._process is None:
                self._run()
            self._take()
        return self._errors[name]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            self._process = None

    def _run(self) -> None:
        path = self._folder / "settings.json"
        path.write_text(json.dumps(self._settings | {"cases": self._left}))
        self._log = self._folder / "stderr.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*self._command, path], cwd=self._folder, env=self._env, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace"
            )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True)
        self._reader.start()
        self._at_work = None

    def _take(self) -> None:
        """The next line of the process; if none comes, the case at work has failed, and the others go on in a new process."""
        limit = self._start if self._at_work is None else self._limit
        try:
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            return self._failed(f"did not end within {limit:g} seconds")
        if line is None:
            return self._failed(f"ended the process with exit code {self._process.wait()}")
        if line.startswith('{"begin"'):
            self._at_work = json.loads(line)["begin"]
        elif line.startswith('{"case"'):
            told = json.loads(line)
            self._end(told["case"], told["error"])

    def _failed(self, what: str) -> None:
        self.close()
        log = self._log.read_text(errors="replace")[-3000:]
        if self._at_work is None:  # not one case has begun: neither would the next ones
            for name in list(self._left):
                self._end(name, f"The process {what} before its first case.\n{log}")
        else:
            self._end(self._at_work, f"The case {what}.\n{log}")

    def _end(self, name: str, error: str | None) -> None:
        self._errors[name] = error
        if name in self._left:
            self._left.remove(name)


def _read(stream, lines: queue.SimpleQueue) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)

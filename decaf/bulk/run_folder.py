"""A folder that knows which of its run's jobs are done, whatever happened to the run."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

from ..errors import DecafError, OutputError, reason, shown
from ..files import write_json
from ..folder_lock import FolderLocks

RUN = "run.json"
RECORDS = "records"


class RunFolder:
    """Holds `run.json`, the settings that made what is in it, and `records/KEY.json` of every job that is done.

    Within `with`, it is locked against other runs. A kill at any moment loses the jobs under way, no other.

        with RunFolder(Path("out"), {"model": "7B"}) as run:
            left = [job for job in jobs if not run.done(job.key)]
            for outcome in run_jobs(left, make_worker):
                if outcome.error is None:
                    run.finish(outcome.key, outcome.record)

    Args:
        settings: what decides the results, as JSON; a later run must have the same. Not how many workers there are.
        name: the option that the folder is given with, for messages.

    Raises DecafError on entering: another run writes into the folder, it holds a run with other settings or something else of that name, or it
    cannot be written to.
    """

    def __init__(self, folder: Path, settings: dict, name: str = "--out"):
        self.folder = folder
        self._settings, self._name = json.loads(json.dumps(settings)), name
        self._locks = FolderLocks()
        self._done: set[str] = set()

    def __enter__(self) -> RunFolder:
        self._prepare()
        self._locks.take(self.folder)
        try:
            self._compare()
            self._done = self._finished()
        except BaseException:
            self._locks.release(self.folder)
            raise
        return self

    def __exit__(self, *_) -> None:
        self._locks.release(self.folder)

    def done(self, key: str) -> bool:
        """Whether that job has been finished, by this run or an earlier one."""
        return key in self._done

    def record(self, key: str) -> dict:
        """What a job was finished with. DecafError: it is not finished, or the file is damaged; it then no longer counts as done."""
        path = self._path(key)
        try:
            return _object(path)
        except (OSError, ValueError, RecursionError) as error:
            self._done.discard(key)
            raise DecafError(
                f"{shown(path)} is damaged ({reason(error)}). Remove it and run again; that job alone is done again."
            ) from error

    def finish(self, key: str, record: dict) -> None:
        """Writes what a job has come to, all or nothing. To be called when all its other results are written. `OutputError`: it cannot be written."""
        write_json(self._path(key), record)
        self._done.add(key)

    def forget(self, key: str) -> None:
        """The job counts as not done, and is to be done again. `OutputError`: its record cannot be removed."""
        path = self._path(key)
        self._done.discard(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{shown(path)} cannot be removed ({reason(error)}). Change the permissions of its folder.") from error

    def _path(self, key: str) -> Path:
        return self.folder / RECORDS / f"{key}.json"

    def _prepare(self) -> None:
        try:
            (self.folder / RECORDS).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder / RECORDS).close()
        except (FileExistsError, NotADirectoryError) as error:
            raise DecafError(
                f"{self._name} {shown(self.folder)} is a file, lies in one, or has one called {RECORDS}. Give a folder."
            ) from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise DecafError(f"{self._name} {shown(self.folder)} cannot be written to ({reason(error)}). Give another folder.") from error

    def _compare(self) -> None:
        path = self.folder / RUN
        try:
            earlier = _object(path)
        except FileNotFoundError:
            write_json(path, self._settings)
            return
        except (OSError, ValueError, RecursionError) as error:
            raise DecafError(
                f"{self._name} {shown(self.folder)} has a {RUN} that is not one of ours ({reason(error)}). Give another folder."
            ) from error
        if earlier != self._settings:
            raise DecafError(
                f"{self._name} {shown(self.folder)} holds a run with other settings: {_differences(earlier, self._settings)}. "
                "Give the same ones to go on with it, or another folder."
            )

    def _finished(self) -> set[str]:
        try:
            with os.scandir(self.folder / RECORDS) as entries:
                names = [entry.name for entry in entries]
            for name in names:
                if _UNFINISHED.fullmatch(name):  # a kill left it behind
                    (self.folder / RECORDS / name).unlink()
            return {name[:-5] for name in names if name.endswith(".json") and not name.startswith(".")}
        except OSError as error:
            raise DecafError(f"{self._name} {shown(self.folder)} cannot be read ({reason(error)}). Change its permissions.") from error


_LARGEST = 64 << 20
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.part\.json")
"""Names of `atomic_write` for records."""


def _object(path: Path) -> dict:
    """The JSON object in a file. OSError, ValueError or RecursionError if there is none."""
    if path.is_dir() or (path.exists() and (not path.is_file() or path.stat().st_size > _LARGEST)):
        raise ValueError("no file of JSON")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def _differences(before: dict, now: dict, most: int = 3) -> str:
    """Such as "max_key_frames was 16 and is 8", of a few settings."""
    flat, new = _flat(before), _flat(now)
    names = [name for name in {**flat, **new} if flat.get(name, _NONE) != new.get(name, _NONE)]
    told = [f"{name} was {_value(flat, name)} and is {_value(new, name)}" for name in names[:most]]
    return ", ".join(told) + (f", and {len(names) - most} more" if len(names) > most else "")


_NONE = object()


def _value(settings: dict, name: str) -> str:
    return shown(json.dumps(settings[name], ensure_ascii=False), 60) if name in settings else "not there"


def _flat(settings: dict, before: str = "") -> dict:
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat

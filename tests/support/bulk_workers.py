"""Workers for jobs that need no models. They stand here, and not in a test, since processes of their own import them."""

import os
import signal
import time
from functools import partial
from pathlib import Path

from decaf.bulk import Job
from decaf.errors import DecafError, OutputError


def told(job: Job) -> dict:
    """What to do is the payload: nothing, or a word."""
    match job.payload:
        case "fails":
            raise DecafError("This one fails.")
        case "breaks":
            raise KeyError("oh")
        case "full":
            raise OutputError("The disk is full.")
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case ["dies once", folder]:
            mark = Path(folder) / job.key
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        case ["waits", seconds]:
            time.sleep(seconds)
    return {"key": job.key}


def make():
    return told


def no_models():
    raise DecafError("There are no models.")


def died_loading():
    os.kill(os.getpid(), signal.SIGKILL)


def make_marked(folder: str):
    """Leaves a file for each process that loads."""
    (Path(folder) / f"loaded-{os.getpid()}").touch()
    return partial(_marked, folder)


def _marked(folder: str, job: Job) -> dict:
    time.sleep(0.05)
    return {"key": job.key, "pid": os.getpid()}

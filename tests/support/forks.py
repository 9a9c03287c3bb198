"""Runs of the command in forks of a process that has imported everything and computed nothing: soon started, and alone with their memory.

A fork of a process that has computed would wait for ever for the threads that it has not.
"""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """`status`: of the exit, or minus the number of the signal that ended it. `late`: it was killed for its time. `held`: most bytes."""

    status: int
    told: str
    held: int
    late: bool


class Forks:
    """`limit`: bytes of address space that a run may take, so that one that takes all memory fails by itself."""

    def __init__(self, limit: int = 12 << 30):
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(limit)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def run(self, line: list[str], folder, seconds: float) -> Ended:
        """The command with these arguments in `folder`, killed when `seconds` are over."""
        self._server.stdin.write(json.dumps([line, str(folder), seconds]) + "\n")
        self._server.stdin.flush()
        return Ended(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def serve(limit: int) -> None:
    import huggingface_hub.constants
    import transformers
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401

    import decaf.command.segment  # noqa: F401
    from decaf.command import main as cli
    from decaf.sam2.package import sam2_package

    sam2_package()
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    for name in ("qwen2_vl", "qwen2_5_vl", "internvl"):
        __import__(f"transformers.models.{name}.modeling_{name}")
        __import__(f"transformers.models.{name}.processing_{name}")
        __import__(f"transformers.models.{name}.configuration_{name}")
    Image.init()
    del transformers
    gc.freeze()  # what is imported is not looked through again in each fork
    for text in sys.stdin:
        line, folder, seconds = json.loads(text)
        told = os.path.join(folder, "told")
        child = os.fork()
        if not child:
            _be_the_command(cli.main, line, folder, told, limit)
        begun, late = time.monotonic(), False
        while True:
            ended, status, used = os.wait4(child, os.WNOHANG)
            if ended:
                break
            if not late and time.monotonic() - begun > seconds:
                os.kill(child, signal.SIGKILL)
                late = True
            time.sleep(0.002)
        status = os.waitstatus_to_exitcode(status)
        with open(told, encoding="utf-8", errors="replace") as file:
            print(json.dumps({"status": status, "told": file.read(), "held": used.ru_maxrss * 1024, "late": late}), flush=True)


def _be_the_command(main, line, folder, told, limit):
    import resource
    import traceback

    status = 70
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.chdir(folder)
        written = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, stream in enumerate((os.open(os.devnull, os.O_RDONLY), written, written)):
            os.dup2(stream, number)
        sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="replace", closefd=False)
        status = main(line)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 71)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    serve(int(sys.argv[1]))

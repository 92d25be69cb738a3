"""Run a module as one rank of ``launch``: ``python -m nemo_dist.launcher.worker MODULE ARGUMENTS``."""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from time import time

from nemo_dist.errors import NemoDistError

FOLDER = "NEMO_DIST_FAILURES"
LAUNCHER = "NEMO_DIST_LAUNCHER"
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run the module named by the first argument; on failure, record the error for the launcher and exit at once."""
    module, *arguments = sys.argv[1:]
    _follow_launcher()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        _flush()
    except SystemExit as error:
        if error.code not in (None, 0):
            code = error.code if isinstance(error.code, int) else 1
            said = f"exited with code {code}" if isinstance(error.code, int) else str(error.code)
            _end(said, "", code)
    except NemoDistError as error:
        _end(_line(error), "", 2)  # without a traceback: the message alone is written for the user
    except BaseException as error:
        _end(_line(error), _traceback(error), 1)


def _end(error: str, trace: str, code: int) -> None:
    record = json.dumps({"error": error, "traceback": trace, "code": code, "at": time()})
    folder, rank = Path(os.environ[FOLDER]), os.environ["RANK"]
    beside = folder / f"rank{rank}.unfinished"  # the launcher may kill this process while it writes
    try:
        beside.write_text(record)
        beside.replace(folder / f"rank{rank}.json")
    except OSError:  # a full disk, which may be why this rank fails
        sys.stderr.write(f"{trace}\n{error}\n".lstrip())
    _flush()
    # A normal exit would destroy the process group, which waits for peers that wait for this rank in a collective.
    os._exit(code)


def _flush() -> None:
    """Write out what was said; where the disk of a log is full, drop it, as it would make a failure of a success."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _follow_launcher() -> None:
    """End this process when the launcher dies or on SIGINT or SIGTERM, even inside a collective that never returns."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[LAUNCHER]):
        sys.exit("the launcher is gone")


def _line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _traceback(error: BaseException) -> str:
    frames = error.__traceback__
    own = (__file__, runpy.__file__, "<frozen runpy>")
    while frames is not None and frames.tb_frame.f_code.co_filename in own and frames.tb_next is not None:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


if __name__ == "__main__":
    main()

"""Run every check that needs a CUDA device, most telling first, within a time: ``bash benchmarks/gpu.sh``.

Each check is a forked process, so what hangs or crashes takes only itself along. Those that compare numbers run beside
each other, those that take times run alone. ``--check`` runs all of them on the CPU, small: it shows that nothing but
the device is missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs

sys.path[:0] = [str(Path(__file__).parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
)  # the checks are forked: CUDA must not start in this process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import exactness  # noqa: E402
import on_ranks  # noqa: E402
import speed  # noqa: E402
import split_attention  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import waits  # noqa: E402
from record import Place, Record  # noqa: E402

_BESIDE = 6  # checks at a time, of those that take no times


@attrs.frozen
class Check:
    """A check: what it runs, for how many seconds at most, and whether it must be alone on the machine."""

    run: Callable[[Place, Record], None]
    seconds: float
    alone: bool = False
    environment: dict[str, str] = attrs.field(factory=dict)

    @property
    def name(self) -> str:
        """The name of the function, with what is special about its environment."""
        special = "".join(f", {name}={value}" for name, value in self.environment.items())
        return self.run.__name__.replace("_", " ") + special


_BLOCKING = {"CUDA_LAUNCH_BLOCKING": "1"}
CHECKS = (
    Check(exactness.the_loop, 100),
    Check(exactness.megatron_fsdp, 100),
    Check(exactness.megatron_fsdp, 100, environment=_BLOCKING),
    Check(on_ranks.ranks_on_one_card, 150),
    Check(exactness.offload, 60),
    Check(exactness.missing_head, 60),
    Check(exactness.new_models, 60),
    Check(exactness.asynchronous_save, 60),
    Check(exactness.dropout_and_resume, 60),
    Check(exactness.recomputation, 60),
    Check(exactness.experts, 60),
    Check(exactness.compiled, 120),
    Check(exactness.bad_token, 40),
    Check(split_attention.ring_kernels, 40),
    Check(split_attention.packed_kernel, 40),
    Check(waits.synchronisations, 60),
    Check(on_ranks.pipeline_on_one_card, 60),
    Check(exactness.demo, 100),
    Check(waits.attention, 60, alone=True),
    Check(speed.checkpoints, 90, alone=True),
    Check(speed.step_ours, 60, alone=True),
    Check(speed.step_ours_with_a_fused_optimizer, 60, alone=True),
    Check(speed.step_by_hand, 60, alone=True),
    Check(speed.step_of_trainer, 60, alone=True),
)


def main() -> None:
    """Run the checks, print a table, write JSON, and end with 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="checks whose names contain one of these; all by default"
    )
    parser.add_argument("--check", action="store_true", help="on the CPU, small: does all start?")
    parser.add_argument("--seconds", type=float, default=450, help="stop after this time (default: 450)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    chosen = [check for check in CHECKS if not options.names or any(name in check.name for name in options.names)]
    report: dict[str, Any] = {"machine": machine(not options.check), "checks": {}}
    with tempfile.TemporaryDirectory(prefix="nemo_dist_gpu_") as folder:
        for check, found in results(chosen, not options.check, Path(folder), time.monotonic() + options.seconds):
            report["checks"][check.name] = found
            show(check.name, found)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [name for name, found in report["checks"].items() if not right(found)]
    print(f"{len(report['checks']) - len(wrong)} of {len(report['checks'])} checks are right")
    print("".join(f"- {name}\n" for name in wrong))
    sys.exit(bool(wrong))


def machine(cuda: bool) -> dict[str, Any]:
    """Return where and with what this runs."""
    packages = {name: version(name) for name in ("torch", "transformers", "megatron-fsdp")}
    device = multiprocessing.get_context("fork").Queue()
    if cuda:
        _fork(lambda: device.put(torch.cuda.get_device_name(0))).join()
    card = {"device": device.get(timeout=5)} if cuda else {}
    return {
        "date": time.strftime("%Y-%m-%d"),
        **card,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    } | packages


def _fork(function: Callable[[], None]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


@attrs.define
class _Running:
    check: Check
    process: Any
    record: Record
    started: float
    deadline: float

    def result(self) -> dict[str, Any]:
        """Return the lines, and how the process ended."""
        self.process.join(0.1)
        code = self.process.exitcode
        end = {0: "done", None: "stopped: out of time"}.get(code, f"ended with {code}")
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # the ranks that it started, too
        return {"end": end, "seconds": round(time.monotonic() - self.started, 1), "lines": self.record.lines()}


def results(
    checks: Sequence[Check], cuda: bool, folder: Path, deadline: float
) -> Iterator[tuple[Check, dict[str, Any]]]:
    """Yield each check with its result as they end; those that run alone come last."""
    shared = folder / "shared"
    shared.mkdir()
    waiting = sorted(checks, key=lambda check: check.alone)
    running: list[_Running] = []
    while waiting or running:
        while waiting and len(running) < (
            1 if waiting[0].alone or any(one.check.alone for one in running) else _beside()
        ):
            running.append(_start(waiting.pop(0), cuda, folder, shared, deadline))
        time.sleep(0.05)
        for one in [one for one in running if not one.process.is_alive() or time.monotonic() > one.deadline]:
            running.remove(one)
            yield one.check, one.result()


def _beside() -> int:
    return max(1, min(_BESIDE, (os.cpu_count() or 1) // 2))


def _start(check: Check, cuda: bool, folder: Path, shared: Path, deadline: float) -> _Running:
    own = folder / check.name.replace(" ", "_")
    own.mkdir()
    record, now = Record(own / "lines.jsonl"), time.monotonic()

    def run() -> None:
        os.environ.update(check.environment)
        os.setsid()
        sys.stdout = sys.stderr = open(own / "output", "w")  # noqa: SIM115, it lives as long as the process
        try:
            check.run(Place(cuda=cuda, folder=own, shared=shared), record)
        except BaseException:
            record.judge("the check itself", False, traceback.format_exc()[-3000:])
        os._exit(0)

    return _Running(check, _fork(run), record, now, min(deadline, now + check.seconds))


def right(found: dict[str, Any]) -> bool:
    """Whether a check came to its end and nothing in it is wrong."""
    return found["end"] == "done" and all(line.get("right", True) for line in found["lines"])


def show(name: str, found: dict[str, Any]) -> None:
    """Print the lines of one check."""
    print(f"{'right' if right(found) else 'WRONG'}  {name} ({found['end']}, {found['seconds']} s)")
    for line in found["lines"]:
        mark = {True: "ok   ", False: "WRONG", None: "     "}[line.get("right")]
        print(f"  {mark} {line['what']}: {line['found']}", flush=True)


if __name__ == "__main__":
    main()

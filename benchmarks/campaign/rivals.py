"""Two runs save to one folder at the same time: one of them is told, and what the other has saved is there."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from campaign.forks import Fork, end, fork, until
from campaign.remains import wrong_with
from campaign.tally import Tally
from campaign.tiny_run import TinyRun, checksum
from nemo_dist import CheckpointError, RunFolder
from nemo_dist.testing.tensors import saved_weights

_SAVES = 6


def run(count: int, chance: Random, folder: Path) -> Iterator[Tally]:
    """Yield the counts for two runs in one run folder, in one checkpoint, and in one export."""
    for name, work in (("run folder", save), ("checkpoint", save_alone), ("export", export)):
        tally = Tally(f"two runs, one {name}")
        for index in range(count):
            _rival(folder / f"{name}-{index}", work, chance, tally)
        yield tally


def save(run: TinyRun, folder: Path, chance: Random) -> None:
    """Save to a run folder."""
    run.save(RunFolder(folder / "run", keep_last=2), asynchronous=chance.random() < 0.5).wait()


def save_alone(run: TinyRun, folder: Path, chance: Random) -> None:
    """Save over one checkpoint, which is given a place like that in a run folder."""
    run.runtime.save(folder / "run" / "step-00000001", run.optimizer, **run.also)


def export(run: TinyRun, folder: Path, chance: Random) -> None:
    """Export over one folder."""
    run.runtime.export(folder / "exported")


def on_rank_save(tell: Callable[..., None], work: Callable[[TinyRun, Path, Random], None], folder: Path, seed: int):
    """Save some steps, at moments of chance."""
    warnings.simplefilter("ignore")
    chance, run = Random(seed), TinyRun()
    tell("ready")
    for _ in range(_SAVES):
        run.train()
        time.sleep(chance.uniform(0, 0.02))
        tell("weights", checksum(run.weights()))
        try:
            work(run, folder, chance)
        except CheckpointError as error:
            tell("refused", str(error))
            return
        tell("saved", run.step)
    tell("done")
    signal.pause()  # it goes on to live, and to hold what it holds


def _rival(folder: Path, work: Callable[[TinyRun, Path, Random], None], chance: Random, tally: Tally) -> None:
    folder.mkdir(parents=True)
    runs = [fork(1, on_rank_save, work, folder, chance.randrange(1000))[0] for _ in range(2)]
    finished = True
    for run in runs:
        finished &= until([run], lambda run: _said(run, "refused", "raised", "done"), 120)
    end(runs)
    raised = [str(said[0]) for one in runs for word, *said in one.told if word == "raised"]
    refused = [str(said[0]) for one in runs for word, *said in one.told if word == "refused"]
    problem = "" if finished else "one waits for ever"
    problem = problem or "\n".join(raised) or _wrong(folder, work, runs, refused)
    if problem:
        tally.lose(problem)
    else:
        tally.refuse() if refused else tally.survive()


def _said(one: Fork, *words: str) -> bool:
    return any(said[0] in words for said in one.told)


def _wrong(folder: Path, work: Callable[..., None], runs: list[Fork], refused: list[str]) -> str:
    if strange := [message for message in refused if "another" not in message]:
        return strange[0]
    if work is export:
        weights = [said[0] for one in runs for word, *said in one.told if word == "weights"]
        return "" if checksum(saved_weights(folder / "exported")) in weights else "the export is a mix of both"
    saved = [max((said[0] for word, *said in one.told if word == "saved"), default=0) for one in runs]
    if work is save and (len(refused) != 1 or sorted(saved) != [0, _SAVES]):
        return f"the runs have saved up to the steps {saved}, and {len(refused)} were refused"
    return wrong_with(RunFolder(folder / "run"), max(saved) if work is save else 1)

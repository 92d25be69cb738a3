"""The pool of gloo ranks: what it runs, and what it says when ranks fail, die or hang."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from nemo_dist.errors import RankError
from nemo_dist.testing.pool import RankPool, RankPools


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, timeout=240) as pool:
        yield pool


def on_rank_sum(tensor: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    total = tensor * scale * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return total


def on_rank_environment() -> dict[str, str | int]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names} | {"pid": os.getpid(), "threads": torch.get_num_threads()}


def on_rank_random_number() -> float:
    return float(torch.rand(()))


def on_rank_fail(rank: int, message: str) -> None:
    if dist.get_rank() == rank:
        print("a last word before the end")
        raise ValueError(message)
    dist.barrier()


def on_rank_fail_everywhere() -> None:
    time.sleep(0.3 * (1 - dist.get_rank()))
    raise KeyError(f"key of rank {dist.get_rank()}")


def on_rank_die(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def on_rank_wait_for_absent(rank: int) -> None:
    if dist.get_rank() != rank:
        dist.barrier()


def on_rank_print(text: str) -> None:
    print(text, dist.get_rank())
    os.write(2, b"from native code\n")


def on_rank_return_unpicklable() -> object:
    return lambda: None


def on_rank_make_groups(count: int) -> int:
    for _ in range(count):
        dist.new_group()
    return os.getpid()


def on_rank_count_devices(count: int) -> int:
    for _ in range(count):
        dist.all_reduce(torch.ones(()), group=dist.new_group())
    tasks = Path("/proc/self/task")
    return sum((task / "comm").read_text().startswith("gloo_tcp") for task in tasks.iterdir())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


def test_every_rank_runs_the_function_and_returns_tensors(pool: RankPool) -> None:
    results = pool.run(on_rank_sum, torch.arange(3.0), scale=2.0)
    assert [result.tolist() for result in results] == [[0.0, 6.0, 12.0]] * 2


def test_ranks_are_reused_and_know_their_rank(pool: RankPool) -> None:
    first, second = pool.run(on_rank_environment), pool.run(on_rank_environment)
    assert first == second
    assert [(one["RANK"], one["LOCAL_RANK"], one["WORLD_SIZE"], one["threads"]) for one in first] == [
        ("0", "0", "2", 1),
        ("1", "1", "2", 1),
    ]


def test_every_call_starts_from_the_same_random_state(pool: RankPool) -> None:
    assert len(set(pool.run(on_rank_random_number) + pool.run(on_rank_random_number))) == 1


def test_a_call_can_run_on_some_ranks_only(pool: RankPool) -> None:
    assert [one["RANK"] for one in pool.run(on_rank_environment, ranks=[1])] == ["1"]
    with pytest.raises(ValueError, match=r"ranks must be different numbers from 0 to 1 \(got \[2\]\)"):
        pool.run(on_rank_environment, ranks=[2])


def test_a_failing_rank_shows_its_traceback_and_the_pool_recovers(pool: RankPool) -> None:
    begun = time.monotonic()
    with pytest.raises(RankError) as caught:
        pool.run(on_rank_fail, 1, "the number is wrong")
    text = str(caught.value)
    assert text.startswith("rank 1 of 2 failed in ")
    assert "ValueError: the number is wrong" in text
    assert "in on_rank_fail" in text and "worker.py" not in text
    assert "a last word before the end" in text
    assert time.monotonic() - begun < 50  # below the collective's timeout, in which rank 0 waits
    assert len(pool.run(on_rank_environment)) == 2


def test_the_rank_that_failed_first_is_named_and_the_others_are_listed(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(on_rank_fail_everywhere)
    text = str(caught.value)
    assert text.startswith("rank 1 of 2 failed") and "rank 0: KeyError: 'key of rank 0'" in text
    assert list(caught.value.failures) == [1, 0]  # type: ignore[attr-defined]


def test_a_killed_rank_is_blamed_and_not_the_peer_that_lost_it(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed in [\s\S]*the process was killed by SIGKILL"):
        pool.run(on_rank_die, 1)


def test_a_hanging_rank_ends_the_call_with_its_stack(pool: RankPool) -> None:
    pool.run(on_rank_environment)  # the ranks have imported this module then, which takes seconds on a busy machine
    with pytest.raises(RankError) as caught:
        pool.run(on_rank_wait_for_absent, 1, timeout=1.5)
    text = str(caught.value)
    assert text.startswith("rank 0 of 2 did not return from") and "within 1.5 s" in text
    assert "in on_rank_wait_for_absent" in text and "in barrier" in text


def test_output_of_ranks_is_printed_where_pytest_captures_it(
    pool: RankPool, capsys: pytest.CaptureFixture[str]
) -> None:
    pool.run(on_rank_print, "hello from")
    out = capsys.readouterr().out
    assert "output of rank 0:\nhello from 0" in out and "hello from 1" in out and "from native code" in out
    pool.run(on_rank_environment)
    assert capsys.readouterr().out == ""


def test_a_function_that_cannot_be_sent_to_ranks_is_refused(pool: RankPool) -> None:
    with pytest.raises(TypeError, match="at the top of a module"):
        pool.run(lambda: None)


def test_a_result_that_cannot_be_sent_back_is_refused_with_its_type(pool: RankPool) -> None:
    with pytest.raises(RankError, match="returned a function that cannot travel back"):
        pool.run(on_rank_return_unpicklable)


def test_a_function_of_a_module_that_cannot_be_imported_is_found(
    pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hidden.py"
    file.write_text("class Box:\n    value = 7\n\ndef unbox(box):\n    return box.value, box\n")
    # As pytest's importlib mode leaves a test module: in sys.modules, with stand-ins for its parents.
    module = ModuleType("nowhere.hidden")
    module.__file__ = str(file)
    monkeypatch.setitem(sys.modules, "nowhere", ModuleType("nowhere"))
    monkeypatch.setitem(sys.modules, "nowhere.hidden", module)
    exec(compile(file.read_text(), file, "exec"), vars(module))
    values = pool.run(module.unbox, module.Box())
    assert [value for value, _ in values] == [7, 7]
    assert all(isinstance(box, module.Box) for _, box in values)


def test_ranks_that_hold_many_process_groups_are_replaced(pool: RankPool) -> None:
    first = pool.run(on_rank_make_groups, 300)
    second = pool.run(on_rank_make_groups, 1)
    assert set(first).isdisjoint(second)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
def test_all_groups_of_a_rank_share_the_thread_that_polls_their_connections(pool: RankPool) -> None:
    assert pool.run(on_rank_count_devices, 20) == [1, 1]


def test_the_least_recently_used_pool_is_closed() -> None:
    pools = RankPools(limit=1)
    try:
        one = [int(place["pid"]) for place in pools(1).run(on_rank_environment)]
        assert [place["WORLD_SIZE"] for place in pools(3).run(on_rank_environment)] == ["3"] * 3
        assert gone(one)
    finally:
        pools.close()


def test_closing_a_pool_leaves_no_process_behind() -> None:
    with RankPool(2) as pool:
        pids = [int(place["pid"]) for place in pool.run(on_rank_environment)]
        assert all(alive(pid) for pid in pids)
    assert gone(pids)


def test_the_fixtures_share_the_pools_of_the_session(
    ranks: Callable[[int], RankPool], on_ranks: Callable[..., list[torch.Tensor]], rank_pools: RankPools
) -> None:
    assert ranks(2) is rank_pools(2)
    assert [result.item() for result in on_ranks(2, on_rank_sum, torch.ones(()))] == [3.0, 3.0]


@pytest.mark.gpu
def test_the_gpu_marker_skips_where_there_is_no_device() -> None:
    assert torch.cuda.is_available()


@pytest.mark.parametrize("size", [0, -1, True, 1.0])
def test_a_pool_of_no_ranks_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="a pool needs a positive number of ranks"):
        RankPool(size)

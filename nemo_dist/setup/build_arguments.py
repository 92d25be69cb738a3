"""Validate the arguments of ``build`` besides sizes and plugins: ranks, activation checkpointing, device, timeout."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from nemo_dist.mesh.launch_env import launched_world_size
from nemo_dist.planning.validation import YEAR, number_of_ranks, same, shown
from nemo_dist.plugin.protocol import Plugin
from nemo_dist.setup.selection import RECOMPUTE, Selection

SCOPE = f"{RECOMPUTE}_scope"
_EVERYWHERE: tuple[Any, ...] = (None, "all", ["all"], ("all",))  # the scopes that restrict nothing
_MODES: dict[Any, str] = {True: "full", "full": "full", "selective": "selective"}


def launched_ranks() -> int:
    """Return the size of the process group if there is one, else the number of ranks that were launched together."""
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size()
    return launched_world_size()


def mesh_ranks(ranks: Sequence[int] | None, world_size: int, problems: list[str]) -> tuple[tuple[int, ...] | None, int]:
    """Return the ranks of the mesh (None: all) and their number; add what is wrong with them to *problems*.

    Raises TypeError for a rank that is not an int.
    """
    number_of_ranks("world_size", world_size)
    if ranks is None:
        return None, world_size
    if isinstance(ranks, str) or not isinstance(ranks, Iterable):
        raise TypeError(f"ranks must be a list of ints (got {shown(ranks)})")
    chosen = tuple(ranks)
    for rank in chosen:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"ranks must be ints (got {shown(rank)})")
    repeated = sorted(rank for rank, times in Counter(chosen).items() if times > 1)
    if repeated:
        problems.append(f"ranks names {shown(repeated)} more than once; a rank has one place in the mesh")
    if list(chosen) != sorted(chosen):
        problems.append(
            f"ranks must ascend (got {shown(list(chosen))}), as they do in torch's process groups; sort them"
        )
    outside = sorted({rank for rank in chosen if not 0 <= rank < world_size})
    if outside:
        problems.append(f"ranks names {shown(outside)}, but the world has ranks 0 to {world_size - 1}")
    if not chosen:
        problems.append("ranks is empty; name at least one rank, or leave it out for all")
    return chosen, max(1, len(chosen))


def select_recompute(asked: Any, strategy: Plugin, selection: Selection) -> bool | str:
    """Select the plugin for activation checkpointing if requested; return what was asked for, False for nothing.

    It may be *asked* of ``build``, set on the strategy's config, or selected in ``plugins=``. Conflicts are added to
    the problems of *selection*.
    """
    kind, given = type(strategy.config).__name__, selection.delegated(RECOMPUTE)
    named = selection.filling(RECOMPUTE)
    mode = named.config.mode if named else _recompute_mode(asked, given.get(RECOMPUTE), kind, selection.problems)
    scope = given.get(SCOPE)
    scope = None if any(same(scope, everywhere) for everywhere in _EVERYWHERE) else scope
    if named and (not same(asked, False) or RECOMPUTE in given or scope is not None):
        selection.problems.append(f"{RECOMPUTE} is set both here and in plugins=({shown(named.config)},); set it once")
    elif mode and not named:
        settings = {"mode": mode} if scope is None else {"mode": mode, "scope": scope}
        selection.role(RECOMPUTE, f"{RECOMPUTE}={mode!r} was asked for", **settings)
    elif scope is not None:
        selection.problems.append(
            f"{kind}.{SCOPE}={shown(scope)} was given, but nothing is recomputed; set {RECOMPUTE}=True, or leave the "
            "scope out"
        )
    if mode:
        feature = RECOMPUTE if mode == "full" else f"{RECOMPUTE}:{mode}"
        selection.judge_feature(strategy, feature, f"{RECOMPUTE}={mode!r} was asked for")
    written = [value for value in (asked, given.get(RECOMPUTE), mode) if isinstance(value, bool | str) and value]
    return written[0] if mode else False


def _recompute_mode(asked: Any, on_config: Any, kind: str, problems: list[str]) -> str | None:
    """Return the mode of activation checkpointing, *asked* of ``build`` or set *on_config*, which must not conflict."""
    modes: list[str | None] = []
    for where, value in ((RECOMPUTE, asked), (f"{kind}.{RECOMPUTE}", on_config)):
        if isinstance(value, bool | str) and value in _MODES:
            modes.append(_MODES[value])
        elif value is None or value is False:
            modes.append(None)
        else:
            modes.append(None)
            problems.append(f"{where} must be False, True, 'full' or 'selective' (got {shown(value)})")
    on_setup, on_strategy = modes
    if on_setup and on_strategy and on_setup != on_strategy:
        problems.append(f"{RECOMPUTE} is {on_setup!r} on the setup but {on_strategy!r} on {kind}; set it in one place")
    return on_setup or on_strategy


def judge_runtime_options(device_type: Any, timeout_minutes: Any, problems: list[str]) -> None:
    """Validate the device type and the timeout of collectives.

    Raises TypeError for a wrong type; a timeout that is not positive is added to *problems*.
    """
    if device_type is not None and not isinstance(device_type, str):
        raise TypeError(f"device_type must be 'cpu', 'cuda' or None (got {shown(device_type)})")
    if timeout_minutes is None:
        return
    if isinstance(timeout_minutes, bool) or not isinstance(timeout_minutes, int | float):
        raise TypeError(f"timeout_minutes must be a number of minutes (got {shown(timeout_minutes)})")
    if not 0 < timeout_minutes <= YEAR:
        positive = "positive" if not timeout_minutes > 0 else f"at most {YEAR}, a year"
        problems.append(f"timeout_minutes must be {positive} (got {shown(timeout_minutes)})")

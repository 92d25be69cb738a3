"""Record what ranks communicate, in order: collectives, messages, meetings in the store, and groups that are made.

:func:`assert_no_deadlock` trains under a setup and plays the record back by the rules of NCCL (``comm_playback``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import device_mesh, distributed_c10d
from torch.distributed.tensor import DTensor

from nemo_dist.mesh import store_consensus
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.comm_playback import Event, Meeting, Message, Post, Wait, problems_either_way
from nemo_dist.testing.equivalence import MAX_NORM, Task, checkpoint
from nemo_dist.testing.temp_folders import scratch
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.torch_private import FUNCTIONAL_COLLECTIVES, TorchDispatchMode, group_named, tensors_in

# Operators of the namespace c10d that are no collectives; messages are recorded above them, where batches show.
_NO_COLLECTIVES = ("send", "recv_", "recv_any_source_")
_UNEQUAL = ("alltoall", "all_to_all")  # collectives to which each rank may give another number of bytes


def assert_no_deadlock(pool: Any, task: Task, **options: Any) -> None:
    """Assert that no rank of *pool* would wait for ever on NCCL in a run under ``DistributedSetup.build(**options)``.

    The run builds, loads, trains two steps, evaluates a pipeline, saves, loads again and exports.
    """
    records = pool.run(record_run, task, checkpoint(task.specimen, task.seed), scratch("recorded"), options)
    found = problems_either_way(records)
    assert not found, "ranks would wait for ever on NCCL:\n" + "\n".join(found)


def record_run(task: Task, folder: Path, target: Path, options: Mapping[str, Any]) -> list[Event]:
    """Return what this rank communicates in a run of *task* on the checkpoint in *folder*; called on every rank."""
    with recording() as events:
        setup = DistributedSetup.build(**options)
        model = SPECIMENS[task.specimen].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
        runtime = setup.runtime(model)
        optimizer = runtime.optimizer(torch.optim.AdamW, **task.optimizer)
        for step in range(2):
            batches = [rows_of_rank(batch, runtime) for batch in task.batches(step)]
            runtime.forward_backward(batches)
            runtime.clip_grad_norm_(MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        if runtime.mesh.size("pp") > 1:
            model.eval(batches[0])
        runtime.save(target / "saved", optimizer)
        runtime.load(target / "saved", optimizer)
        runtime.export(target / "exported")
    return events


@contextmanager
def recording() -> Iterator[list[Event]]:
    """Record what this thread communicates within the context; yields the list of events, which grows.

    Nothing else changes. Collectives are seen where torch dispatches them, so those of FSDP, of DTensor and of a
    backward pass too. Other threads (that of an asynchronous save) are not recorded.
    """
    events: list[Event] = []
    messages = _Messages(events)
    replaced: list[tuple[Any, str, Any]] = []
    for name in ("isend", "irecv", "batch_isend_irecv"):
        function = getattr(messages, name)  # one object in both places, as torch tells a send from a receive by `is`
        replaced += [(module, name, function) for module in (dist, distributed_c10d)]
    make = _recorded(events, dist.new_group, _new_group)
    replaced += [(module, "new_group", make) for module in (dist, distributed_c10d, device_mesh)]
    replaced.append((store_consensus, "meet", _recorded(events, store_consensus.meet, _meeting)))
    with ExitStack() as stack:
        for module, name, function in replaced:
            stack.enter_context(patch.object(module, name, function))
        stack.enter_context(_Collectives(events))
        yield events


def _recorded(events: list[Event], function: Callable[..., Any], event: Callable[..., Meeting]) -> Callable[..., Any]:
    """Return *function*, which adds ``event(*args, **kwargs)`` to *events* when a member calls it on this thread."""
    thread = threading.get_ident()

    def recorded(*args: Any, **kwargs: Any) -> Any:
        meeting = event(*args, **kwargs)
        if threading.get_ident() == thread and dist.get_rank() in meeting.members:
            events.append(meeting)
        return function(*args, **kwargs)

    return recorded


def _meeting(meeting: Any, occasion: str, *_: Any, **__: Any) -> Meeting:
    return Meeting(group=None, members=tuple(meeting.members), what=f"the meeting {occasion!r}")


def _new_group(
    ranks: Sequence[int] | None = None, *_: Any, use_local_synchronization: bool = False, **__: Any
) -> Meeting:
    """Return the barrier at the end of ``new_group``: of all ranks, or of the members only."""
    everyone = tuple(range(dist.get_world_size()))
    own = everyone if ranks is None else tuple(sorted(ranks))
    return Meeting(
        group=None, members=own if use_local_synchronization else everyone, what=f"making the group of {list(own)}"
    )


class _Collectives(TorchDispatchMode):
    """Adds the collectives that torch dispatches to ``events``."""

    def __init__(self, events: list[Event]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events = events

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor comes back with the operators on its local tensors
        name = str(function).split(".")[1]
        if function.namespace == "c10d" and name not in _NO_COLLECTIVES:
            boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg))
            self._add(name, dist.ProcessGroup.unbox(boxed), args)
        elif function.namespace == FUNCTIONAL_COLLECTIVES and (named := [arg for arg in args if isinstance(arg, str)]):
            self._add(name, group_named(named[-1]), args)
        return function(*args, **(kwargs or {}))

    def _add(self, name: str, group: dist.ProcessGroup, args: Any) -> None:
        members = _members(group)
        if len(members) > 1:
            size = None if name.startswith(_UNEQUAL) else sum(tensor.nbytes for tensor in tensors_in(args))
            self.events.append(Meeting(group=_name(group), members=members, what=name.strip("_"), size=size))


@attrs.define(eq=False)
class _Messages:
    """What stands in place of the functions of torch.distributed that send and receive."""

    events: list[Event]
    _thread: int = attrs.field(factory=threading.get_ident)
    _count: int = 0
    _batch: list[Message] | None = None  # the messages of the batch that is being posted
    _originals: Any = attrs.field(factory=lambda: (dist.isend, dist.irecv, dist.batch_isend_irecv))

    def isend(
        self,
        tensor: Tensor,
        dst: int | None = None,
        group: dist.ProcessGroup | None = None,
        tag: int = 0,
        group_dst: int | None = None,
    ) -> Any:
        work = self._originals[0](tensor, dst=dst, group=group, tag=tag, group_dst=group_dst)
        ends = dist.get_rank(), _global(dst, group_dst, group)
        return self._posted(work, group, Message(source=ends[0], target=ends[1], size=tensor.nbytes))

    def irecv(
        self,
        tensor: Tensor,
        src: int | None = None,
        group: dist.ProcessGroup | None = None,
        tag: int = 0,
        group_src: int | None = None,
    ) -> Any:
        work = self._originals[1](tensor, src=src, group=group, tag=tag, group_src=group_src)
        ends = _global(src, group_src, group), dist.get_rank()
        return self._posted(work, group, Message(source=ends[0], target=ends[1], size=tensor.nbytes))

    def batch_isend_irecv(self, p2p_op_list: list[dist.P2POp]) -> list[Any]:
        self._batch = []
        try:
            works = self._originals[2](p2p_op_list)
        finally:
            messages, self._batch = self._batch, None
        number = self._post(p2p_op_list[0].group, messages, batched=True)
        return [_Work(work, self.events, number) for work in works]

    def _posted(self, work: Any, group: dist.ProcessGroup | None, message: Message) -> Any:
        if threading.get_ident() != self._thread:
            return work
        if self._batch is not None:
            self._batch.append(message)
            return work
        return _Work(work, self.events, self._post(group, [message], batched=False))

    def _post(self, group: dist.ProcessGroup | None, messages: list[Message], batched: bool) -> int:
        self._count += 1
        known = group or _world()
        post = Post(
            number=self._count, group=_name(known), members=_members(known), batched=batched, messages=tuple(messages)
        )
        self.events.append(post)
        return self._count


class _Work:
    """The handle of messages, which also records that it is waited for."""

    def __init__(self, work: Any, events: list[Event], number: int) -> None:
        self._work, self._events, self._number = work, events, number

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for the messages."""
        self._events.append(Wait(self._number))
        return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _world() -> dist.ProcessGroup:
    world: Any = dist.group.WORLD
    return world  # type: ignore[no-any-return]


def _global(rank: int | None, in_group: int | None, group: dist.ProcessGroup | None) -> int:
    """Return the global rank of a message's other end, of which torch takes either number."""
    return dist.get_global_rank(group or _world(), in_group or 0) if rank is None else rank


def _name(group: dist.ProcessGroup) -> str:
    """Return a name of *group* that its members share and no other group of theirs has."""
    return f"group {group.group_name}"


def _members(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(sorted(dist.get_process_group_ranks(group)))

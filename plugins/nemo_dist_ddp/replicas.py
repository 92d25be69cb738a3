"""Apply torch's DistributedDataParallel in place, by hooks; the model keeps its class."""

from __future__ import annotations

import copy
import operator
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nemo_dist import Role
from nemo_dist.mesh.dtensor import parameter_slots
from nemo_dist.torch_private import gradient_hooks, in_backward, run_after_backward
from nemo_dist.training.gradient_average import GradientAverage, has_hook_beside, take_whole

if TYPE_CHECKING:
    from nemo_dist.mesh.mesh_context import MeshContext

_KEY = "_nemo_dist_replicas"  # in the model's __dict__


@attrs.define(kw_only=True, eq=False)
class Replicas:
    """Averages the gradients of *model*, and is made anew when other parameters are trained than before.

    torch's module takes the trained parameters when it is made. It would wait for the gradients of one that was frozen
    since, and leave those of one that was thawed to each rank. Forwards without gradients pass it by. It looks for
    parameters without a gradient from the model's outputs on, or, with ``awaits_loss``, from the loss made of them.

    A forward makes it ready for one backward. ``average`` does the same after every other one: the second of one
    forward or of two, those of forwards of a part of the model, and those that reach less than the outputs are made of
    (``backward(inputs=...)``, or one of a captured activation), for which torch's module would wait. ``begun`` says
    that it averages the gradients of the backward that runs; it stays set by one that fails, where ``running`` returns
    None.
    """

    model: nn.Module
    options: dict[str, Any]
    average: GradientAverage = attrs.field(init=False)
    ready: bool = False
    begun: bool = False
    running: Callable[[], object] = lambda: None
    awaits_loss: bool = False
    ddp: DistributedDataParallel | None = None
    slots: Sequence[tuple[dict[str, Any], str]] = ()  # the dict of a module's own parameters, and a name in it
    parameters: Sequence[nn.Parameter] = ()
    trained: Sequence[bool] = ()

    def __attrs_post_init__(self) -> None:
        self.average = GradientAverage((), self.options["process_group"], self._otherwise)

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        """Return what averages the gradients of a copy of the model, over the same ranks."""
        return Replicas(model=copy.deepcopy(self.model, memo), options=self.options)

    def hear(self) -> None:
        """Hear of the gradients of all parameters that the model has now."""
        self.average.parameters = list(self.model.parameters())
        self.average.start()

    def _otherwise(self) -> bool:
        """Whether the backward that begins is the one that torch's module is ready for."""
        if self.begun and self.running() is not None and self.options["gradient_as_bucket_view"]:
            raise RuntimeError(
                "a backward runs inside of another, as reentrant checkpointing does, and gradient_as_bucket_view=True "
                "keeps gradients of both in the buckets of the first; leave that out, or set use_reentrant=False"
            )
        self._drop_failed()
        self.begun, self.ready = self.ready and self.ddp is not None, False
        if self.begun:

            def end() -> None:
                # Torch's module puts its own end of the backward there with its last bucket: be after that.
                run_after_backward(self._end)

            run_after_backward(end)
            self.running = weakref.ref(end)  # which torch keeps until the backward ends or fails
        return self.begun

    def _end(self) -> None:
        self.begun = False
        if self.ddp is None or _finished(self.ddp):
            self.average.settle()
            return
        self.ddp = None
        if self.options["gradient_as_bucket_view"]:
            raise RuntimeError(
                "a backward reached only some of the parameters that the model's outputs are made of, so ddp has not "
                "averaged their gradients, which gradient_as_bucket_view=True keeps in its buckets; leave that out, or "
                "leave out backward(inputs=...) and start at the outputs of the model"
            )
        self.average.run()

    def _drop_failed(self) -> None:
        """Drop torch's module where the last backward failed: it would wait for the rest of that for ever."""
        if self.begun:
            self.begun, self.ddp = False, None

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return None
        if not in_backward():
            self._drop_failed()
            self._refuse_hooks(model)
        now = [own.get(name) for own, name in self.slots]
        same = all(map(operator.is_, now, self.parameters))
        if self.ddp is None or not same or self.trained != [parameter.requires_grad for parameter in self.parameters]:
            self._take_over()
        if self.ddp is None:
            return None
        self.ddp.require_backward_grad_sync = self.average.synchronised
        return self.ddp._pre_forward(*args, **kwargs)

    def _refuse_hooks(self, model: nn.Module) -> None:
        """Raise RuntimeError where a hook of the user's would see, or change, the gradient of one rank's rows."""
        hooked = [name for name, one in model.named_parameters() if gradient_hooks(one)[0] or has_hook_beside(one)]
        if hooked:
            raise RuntimeError(
                f"{', '.join(hooked[:3])} has a hook of its gradient, which ddp would call with that of one rank's "
                "rows, before it is averaged; change what runtime.named_parameters() gives in .grad after the backward"
            )

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        return output if self.awaits_loss else self.before_backward(output)

    def before_backward(self, output: Any) -> Any:
        """Return *output*, on which the next backward starts, as torch's module prepares it."""
        if self.ddp is None or not torch.is_grad_enabled():
            return output
        self.ready = self.average.synchronised
        return self.ddp._post_forward(output)

    def _take_over(self) -> None:
        """Make torch's module for what is trained now; all data-parallel ranks take part, as it compares shapes."""
        self.parameters = list(self.model.parameters())
        first = {id(one): (module._parameters, slot) for _, module, slot, one in parameter_slots(self.model)}
        self.slots = [first[id(one)] for one in self.parameters]
        self.trained = [parameter.requires_grad for parameter in self.parameters]
        self.hear()
        self.ddp = None  # first, so that the hooks of the old one are gone
        if any(self.trained):
            held = nn.ParameterList(self.parameters)
            if self.options["broadcast_buffers"]:
                for index, buffer in enumerate(self.model.buffers()):
                    held.register_buffer(f"of_model_{index}", buffer)
            self.ddp = DistributedDataParallel(held, **self.options)


def replicate(part: nn.Module, mesh: MeshContext, options: dict[str, Any]) -> None:
    """Average the gradients of *part* over the data-parallel ranks during every backward."""
    group = mesh.group(Role.TOKENS)
    if group is None:
        return
    # Searching for unused parameters is a precaution: that there are none is no news.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    replicas = Replicas(model=part, options={"process_group": group, **options})
    replicas.hear()
    part.__dict__[_KEY] = replicas
    take_whole(part)
    part.register_forward_pre_hook(replicas._before_forward, with_kwargs=True)
    part.register_forward_hook(replicas._after_forward)


def forward_to_loss(part: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """Return the loss that *run* makes of a forward of *part*, prepared for its backward.

    A loss may leave outputs out (that of a pooler, say), and parameters behind them then get no gradient.
    """
    replicas: Replicas | None = part.__dict__.get(_KEY)
    if replicas is None:
        return run()
    replicas.awaits_loss = True
    try:
        loss = run()
    finally:
        replicas.awaits_loss = False
    prepared: Tensor = replicas.before_backward(loss)
    return prepared


@contextmanager
def unsynchronised(parts: list[nn.Module]) -> Iterator[None]:
    """Within the context, leave gradients of *parts* local: a backward communicates nothing."""
    with ExitStack() as stack:
        for replicas in _replicated(parts):
            stack.enter_context(replicas.average.unsynchronised())
        yield


def unreduced(parts: list[nn.Module]) -> dict[nn.Parameter, Callable[[], None]]:
    """Return the parameters of *parts* whose gradients are not averaged yet, each with what forgets that."""
    return {one: drop for replicas in _replicated(parts) for one, drop in replicas.average.unreduced().items()}


def _replicated(parts: list[nn.Module]) -> list[Replicas]:
    return [part.__dict__[_KEY] for part in parts if _KEY in part.__dict__]


def _finished(ddp: DistributedDataParallel) -> bool:
    """Whether *ddp* has averaged all gradients that it waited for."""
    try:
        ddp._check_reducer_finalized()
    except RuntimeError:
        return False
    return True

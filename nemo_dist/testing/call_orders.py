"""Test that the order of calls changes nothing but what it should: run any order on ranks and on one process.

An order is a list of names of calls, see ``call_names``. ``expected`` makes the calls on plain transformers and torch,
``traced`` on the ranks of a pool, and ``assert_order_changes_nothing`` compares every loss, norm and generated token on
the way, and weights, gradients and optimizer state at the end. ``strategies.call_orders`` draws orders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from nemo_dist.hf_model import IGNORED
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.testing.call_names import FROZEN, possible
from nemo_dist.testing.equivalence import checkpoint, tensor_differences, whole_state
from nemo_dist.testing.localise import FACTOR, MOST
from nemo_dist.testing.temp_folders import scratch
from nemo_dist.testing.tensors import rows_of_rank, saved_weights
from nemo_dist.testing.tiny_models import SPECIMENS

OPTIMIZER: Mapping[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-5}
MAX_NORM = 0.5
TOLERANCE = 1e-5
MOMENTS = 3e-5  # of AdamW's moments, the second of which squares its gradients; under tp 1.7e-5 was seen
_ROWS, _LENGTH = 4, 8


@attrs.frozen(kw_only=True)
class Trace:
    """What an order of calls gave: numbers on the way by place and call, and whole tensors at the end by name."""

    numbers: Mapping[str, list[float]]
    tensors: Mapping[str, Mapping[str, Tensor]]


@attrs.define(kw_only=True, eq=False)
class Caller:
    """Makes the calls on a plain model in one process; the base of the one that makes them on a rank."""

    model: Any
    specimen: str
    optimizer: Any = None
    numbers: dict[str, list[float]] = attrs.field(factory=dict)
    exported: dict[str, Mapping[str, Tensor]] = attrs.field(factory=dict)
    saved: tuple[Any, Any] | None = None

    def run(self, order: Sequence[str]) -> Trace:
        """Make the calls of *order* and return what they gave."""
        for place, call in enumerate(order):
            name, _, argument = call.partition(" ")
            given = [argument] if argument else [place] if name in _PLACED else []
            found = getattr(self, f"call_{name}")(*given)
            if found is not None:
                self.numbers[f"{place} {call}"] = found
        return Trace(numbers=self.numbers, tensors=self.tensors())

    def batch(self, place: int) -> dict[str, Tensor]:
        """Return the global batch of the call at *place*."""
        return SPECIMENS[self.specimen].batch(_ROWS, _LENGTH, torch.Generator().manual_seed(place))

    # ---- any time ----

    def call_evaluate(self, place: int) -> list[float]:
        """Return the loss of a forward without gradients."""
        with torch.no_grad():
            return self.loss(place)

    def call_infer(self, place: int) -> list[float]:
        """Return the loss of a forward in inference mode."""
        with torch.inference_mode():
            return self.loss(place)

    def call_forward(self, place: int) -> list[float]:
        """Return the loss of a forward with gradients, whose backward is never run."""
        return self.loss(place)

    def loss(self, place: int) -> list[float]:
        """Return the loss of a forward on the whole batch."""
        return [self.model(**self.batch(place)).loss.item()]

    def call_generate(self, place: int) -> list[float]:
        """Return the tokens that the model continues with."""
        tokens = self.batch(place)["input_ids"]
        found = self.model.generate(tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)
        return [float(token) for token in found[:, tokens.shape[1] :].flatten()]

    def call_train(self) -> None:
        """Switch to training mode."""
        self.model.train()

    def call_eval(self) -> None:
        """Switch to evaluation mode."""
        self.model.train(False)

    def call_freeze(self, name: str) -> None:
        """Turn off the gradients of some parameters."""
        for parameter_name, parameter in self.model.named_parameters():
            if parameter_name.startswith(FROZEN[name]):
                parameter.requires_grad_(False)

    def call_thaw(self) -> None:
        """Turn on the gradients of all parameters."""
        for _, parameter in self.model.named_parameters():
            parameter.requires_grad_(True)

    # ---- with a runtime ----

    def call_runtime(self) -> None:
        """Make a runtime; nothing to do on one process."""

    def call_optimizer(self) -> None:
        """Make an optimizer over what is trained now."""
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> Any:
        """Return an optimizer over what is trained now."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, **OPTIMIZER)

    def call_forward_backward(self, place: int) -> list[float]:
        """Run forward and backward of one batch and return the loss."""
        return self.call_accumulate(place, count=1)

    def call_accumulate(self, place: int, count: int = 2) -> list[float]:
        """Run forward and backward of *count* batches and return the loss of all."""
        batches = [self.batch(1000 * index + place) for index in range(count)]
        loss = self.model(**{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}).loss
        loss.backward()
        return [loss.item()]

    def call_own_backward(self, place: int) -> list[float]:
        """Run forward and backward of one batch without the runtime."""
        loss = self.model(**self.batch(place)).loss
        loss.backward()
        return [loss.item()]

    def call_halve_gradients(self) -> None:
        """Change the gradients in place."""
        for parameter in self.named().values():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)

    def call_replace_gradients(self) -> None:
        """Put other tensors in the place of the gradients."""
        for parameter in self.named().values():
            if parameter.grad is not None:
                parameter.grad = parameter.grad * 0.5

    def call_drop(self, name: str) -> None:
        """Drop the gradients of some parameters."""
        for parameter_name, parameter in self.named().items():
            if parameter_name.startswith(FROZEN[name]):
                parameter.grad = None

    @torch.no_grad()
    def call_shrink_weights(self) -> None:
        """Change the weights in place."""
        for parameter in self.named().values():
            parameter.mul_(0.9)

    def call_clip(self) -> list[float]:
        """Clip the gradients and return their norm before."""
        return [torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM).item()]

    def call_export(self, place: int) -> None:
        """Write the weights as plain files, and read them again."""
        folder = scratch("exported")
        self.model.save_pretrained(folder)
        self.exported[f"exported at {place}"] = saved_weights(folder)

    def call_save(self, place: int) -> None:
        """Save weights and optimizer."""
        self.saved = _copied(self.model.state_dict()), None if self.optimizer is None else self.moments()

    def call_load(self) -> None:
        """Load what was saved last."""
        if self.saved is None:
            raise ValueError("nothing was saved")
        weights, state = self.saved
        self.model.load_state_dict(weights)
        if self.optimizer is not None:
            self.optimizer.state.clear()
            for name, parameter in self.model.named_parameters():
                if name in state and any(parameter is one for one in self.stepped):
                    self.optimizer.state[parameter] = {key: value.clone() for key, value in state[name].items()}

    @property
    def stepped(self) -> list[Tensor]:
        """The parameters that the optimizer steps."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Return a copy of the optimizer state, by parameter name and kind."""
        state = self.optimizer.state
        return {name: _copied(state[p]) for name, p in self.model.named_parameters() if state.get(p)}

    # ---- with an optimizer ----

    def call_update(self) -> None:
        """Take an optimizer step."""
        self.optimizer.step()

    def call_zero_grad(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def call_zero_grad_in_place(self) -> None:
        """Set the gradients to zero."""
        self.optimizer.zero_grad(set_to_none=False)

    # ---- the result ----

    def named(self) -> dict[str, Any]:
        """Return the parameters by name."""
        return dict(self.model.named_parameters())

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return *state*, laid out like parameters, as whole tensors."""
        return _copied(state)

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Return weights, gradients, moments and exports as whole tensors."""
        named = self.named()
        found = {"weight": self.whole(dict(named))}
        found["gradient"] = self.whole({name: p.grad for name, p in named.items() if p.grad is not None})
        for kind in ("exp_avg", "exp_avg_sq") if self.optimizer is not None else ():
            state = self.optimizer.state
            found[kind] = self.whole({name: state[p][kind] for name, p in named.items() if state.get(p)})
        return {**found, **self.exported}


@attrs.define(kw_only=True, eq=False)
class RankCaller(Caller):
    """Makes the calls on one of the ranks, on a sharded model."""

    setup: DistributedSetup
    folder: Path
    made: Any = None

    def loss(self, place: int) -> list[float]:
        """Return the loss of a forward on the whole batch, which every rank runs."""
        batch = self.batch(place)
        loss = self.model.eval(batch) if self.is_pipeline else self.model(**batch).loss
        return [loss.item()]

    @property
    def is_pipeline(self) -> bool:
        """Whether the model is split into stages, and so no transformers model."""
        return not isinstance(self.model, torch.nn.Module)

    def call_runtime(self) -> None:
        """Make a runtime."""
        self.made = self.setup.runtime(self.model)

    def make_optimizer(self) -> Any:
        """Return an optimizer over what is trained now."""
        return self.made.optimizer(torch.optim.AdamW, **OPTIMIZER)

    def call_accumulate(self, place: int, count: int = 2) -> list[float]:
        """Run forward and backward of *count* batches and return the loss of all."""
        batches = [rows_of_rank(self.batch(1000 * index + place), self.made) for index in range(count)]
        return [self.made.forward_backward(batches if count > 1 else batches[0]).item()]

    def call_own_backward(self, place: int) -> list[float]:
        """Run forward and backward of one batch in a loop of one's own; return the loss of all ranks."""
        batch = rows_of_rank(self.batch(place), self.made)
        following = pad(batch.pop("labels"), (0, 1), value=IGNORED)[:, 1:]
        inputs = self.made.batch({**batch, "shift_labels": following})
        labels = inputs.pop("shift_labels")
        total = cross_entropy(self.model(**inputs).logits.mT, labels, ignore_index=IGNORED, reduction="sum")
        loss = self.made.scale((labels != IGNORED).sum()) * total
        loss.backward()
        return [mean_of_ranks(loss)]

    def call_clip(self) -> list[float]:
        """Clip the gradients and return their norm before."""
        return [self.made.clip_grad_norm_(MAX_NORM).item()]

    def call_export(self, place: int) -> None:
        """Write the weights as plain files, and read them again."""
        self.made.export(self.folder / f"exported at {place}")
        self.exported[f"exported at {place}"] = saved_weights(self.folder / f"exported at {place}")

    def call_save(self, place: int) -> None:
        """Save weights and optimizer."""
        self.saved = self.folder / f"saved at {place}", None
        self.made.save(self.saved[0], self.optimizer)

    def call_load(self) -> None:
        """Load what was saved last."""
        if self.saved is None:
            raise ValueError("nothing was saved")
        self.made.load(self.saved[0], self.optimizer)

    def named(self) -> dict[str, Any]:
        """Return the parameters of this rank by name."""
        return dict((self.made or self.setup.runtime(self.model)).named_parameters())

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return *state*, laid out like parameters, as whole tensors."""
        return whole_state(self.made or self.setup.runtime(self.model), state)


# Calls that get their place in the order, from which their batch or folder follows.
_PLACED = (
    *("evaluate", "infer", "forward", "generate", "forward_backward", "own_backward", "accumulate"),
    *("export", "save"),
)


def mean_of_ranks(value: Tensor) -> float:
    """Return the mean of *value* over all ranks."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _copied(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def expected(order: Sequence[str], specimen: str = "llama", dtype: torch.dtype = torch.float32) -> Trace:
    """Return what *order* gives on one process, with plain transformers and torch, in *dtype*."""
    model = SPECIMENS[specimen].load.from_pretrained(checkpoint(specimen), dtype=dtype)
    return Caller(model=model, specimen=specimen).run(order)


def trace_on_rank(
    order: Sequence[str], specimen: str, weights: Path, folder: Path, options: Mapping[str, Any]
) -> Trace:
    """Load a model for ``DistributedSetup.build(**options)`` and make the calls of *order*; called on every rank."""
    setup = DistributedSetup.build(**options)
    model = SPECIMENS[specimen].load.from_pretrained(weights, distributed_setup=setup, dtype=torch.float32)
    return RankCaller(model=model, specimen=specimen, setup=setup, folder=folder).run(order)


def traced(pool: Any, order: Sequence[str], specimen: str = "llama", **options: Any) -> Trace:
    """Make the calls of *order* on the ranks of *pool* under ``DistributedSetup.build(**options)``; merge the traces.

    Raises AssertionError where ranks report different numbers, or replicas are not bit-equal.
    """
    traces = pool.run(trace_on_rank, list(order), specimen, checkpoint(specimen), scratch("calls"), options)
    joined: dict[str, dict[str, Tensor]] = {}
    for rank, trace in enumerate(traces):
        assert trace.numbers == traces[0].numbers, f"rank {rank}: {trace.numbers}, but rank 0: {traces[0].numbers}"
        for kind, tensors in trace.tensors.items():
            for name, tensor in tensors.items():
                same = torch.equal(joined.setdefault(kind, {}).setdefault(name, tensor), tensor)
                assert same, f"{kind} of {name} on rank {rank} is not bit-equal to that of an earlier rank"
    return Trace(numbers=traces[0].numbers, tensors=joined)


def differences(found: Trace, wanted: Trace, tolerance: float = TOLERANCE, other: Trace | None = None) -> list[str]:
    """Return a line for each difference of *found* from *wanted* above *tolerance*, relative to the expected norm.

    ``other`` is *wanted* rounded otherwise, as in float64: what rounding explains is no difference then.
    """
    lines = []
    rounded = other or wanted
    for call, values in wanted.numbers.items():
        got = found.numbers.get(call, [])
        if len(got) != len(values) or any(
            not abs(a - b) <= max(tolerance * abs(b), min(FACTOR * abs(b - c), MOST * abs(b)))
            for a, b, c in zip(got, values, rounded.numbers[call], strict=True)
        ):
            lines.append(f"{call}: {got}, expected {values}")
    for kind in wanted.tensors.keys() | found.tensors.keys():
        allowed = max(tolerance, MOMENTS) if kind.startswith("exp_avg") else tolerance
        known = other.tensors.get(kind, {}) if other is not None else {}
        lines += tensor_differences(kind, found.tensors.get(kind, {}), wanted.tensors.get(kind, {}), allowed, known)
    return lines


def assert_order_changes_nothing(pool: Any, order: Sequence[str], specimen: str = "llama", **options: Any) -> None:
    """Assert that *order* gives under ``DistributedSetup.build(**options)`` what it gives on one process."""
    calls = possible(order)
    found, wanted = traced(pool, calls, specimen, **options), expected(calls, specimen)
    lines = differences(found, wanted)
    if lines:  # gradients after a step lose digits by themselves
        lines = differences(found, wanted, other=expected(calls, specimen, torch.float64))
    assert not lines, "\n".join([f"not what one process computes with the calls {calls}:", *lines])

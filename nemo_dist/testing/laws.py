"""The laws of the conformance kit, and how it says that a plugin breaks one: the law, the numbers, where to look."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import attrs

_FRAMES = ("  ", "Traceback", "The above exception", "During handling", "then failed")  # lines of a traceback
_LISTED = 12  # lines of numbers in a message


@attrs.frozen
class Law:
    """What every plugin keeps: a sentence, and what its author looks at when the plugin does not."""

    says: str
    look_at: str

    def broken(self, plugin: str, numbers: Sequence[str], hints: Sequence[str] = ()) -> AssertionError:
        """Return the error that says that *plugin* breaks this law, with the *numbers* that show it."""
        more = [f"and {len(numbers) - _LISTED} more"] if len(numbers) > _LISTED else []
        shown = "\n".join(f"  {line}" for line in [*numbers[:_LISTED], *more])
        return AssertionError(
            f"plugin {plugin!r} breaks a law: {self.says}\n{shown}\nlook at: {'; '.join([*hints, self.look_at])}"
        )

    def hold(self, plugin: str, numbers: Sequence[str], hints: Sequence[str] = ()) -> None:
        """Raise that error when there are *numbers*."""
        if numbers:
            raise self.broken(plugin, numbers, hints)

    @contextmanager
    def judging(self, plugin: str) -> Iterator[None]:
        """Turn whatever the with-block raises, on ranks too, into the error that names this law."""
        try:
            yield
        except AssertionError as error:
            if "breaks a law" in str(error):
                raise
            raise self.broken(plugin, str(error).splitlines()) from error
        except Exception as error:
            notes = list(getattr(error, "__notes__", ()))
            raise self.broken(plugin, [*_lines(error), *notes]) from error


def _lines(error: Exception) -> list[str]:
    """Return the last lines of *error*, which may quote the traceback of a rank, without the frames."""
    lines = str(error).partition("output of rank")[0].splitlines() or [type(error).__name__]
    told = [line.strip() for line in lines if line.strip() and not line.startswith(_FRAMES)]
    return [f"{type(error).__name__}: {told[0]}", *told[1:]] if told else lines


@contextmanager
def as_rank(rank: int) -> Iterator[None]:
    """Within the context the environment and Python's random generator are those of *rank*."""
    before = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK")}
    state = random.getstate()
    os.environ.update(dict.fromkeys(before, str(rank)))
    random.seed(rank)
    try:
        yield
    finally:
        random.setstate(state)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


CATALOGUE = Law(
    "the catalogue has it complete: all attributes, a docstring, and a config that names the plugin",
    "the class attributes in docs/hooks.md, and that entry point, class and config use one name",
)
LAZY = Law(
    "importing the plugin does not import torch, so that planning works without it",
    "imports at the top of its package; import torch inside hooks, or in a module that a hook imports",
)
VALUE = Law(
    "its config is an unchanging value whose text is equal on every rank",
    "@attrs.frozen or nemo_dist.plugin.options.options on the config, and fields without addresses in their repr",
)
ROUND_TRIP = Law(
    "a setup with it can be written as a section of a configuration and built again from that",
    "options that are objects: give the config a converter that takes names and numbers for them",
)
DOCUMENTED = Law(
    "its config class says what every option means",
    "the docstring of the config class, which should name each option",
)
PURE = Law(
    "planning hooks return the same for the same plan on every rank, at any time, and raise nothing",
    "what the hook reads besides its arguments and its own config: random numbers, the environment, the rank",
)
EXPLAINS = Law(
    "explain() returns a line that starts with the plugin's name",
    "the explain hook, which gets model=None where there is no model",
)
REFUSES = Law(
    "a strategy refuses the axes that it does not compose with, by name and size",
    "composes_with of the strategy",
)
PARITY = Law(
    "it computes what one process computes: losses, gradients, norms, and parameters after three AdamW steps",
    "nemo_dist.testing.verify, which finds the first module and the axis where the numbers depart",
)
BOUND = Law(
    "it computes what one process computes within the bound that it states, and is not exact",
    "bound of the kit, which should be little above what is measured; exact = False on the plugin, if it is exact",
)
ACCUMULATES = Law(
    "gradient accumulation over several batches gives the step of one process on all of them",
    "hooks on gradients that run once per backward: they see the sum so far; and no_sync of its RuntimePart",
)
OWN_LOOP = Law(
    "backwards within runtime.no_sync() and one after it give the sum of the gradients of all, averaged once",
    "no_sync of its RuntimePart: what is left local must be reduced by the next backward outside of it",
)
WAITS = Law(
    "optimizer.zero_grad() drops the gradients of backwards within runtime.no_sync(), and a step refuses them",
    "unreduced of its RuntimePart, which names the parameters with gradients that wait, each with what drops them",
)
AGAIN = Law(
    "a second runtime of one model, after a step's backward and an evaluation with the first, computes the same again",
    "hooks put on a model by runtime(), which is called for each runtime (wrap is called once); what a forward without "
    "gradients changes; metrics, which every rank calls",
)
EVALUATES = Law(
    "runtime.evaluate gives the mean loss of one process, and runtime.forward its logits, before and after training",
    "what a forward does without gradients or in evaluation mode; join_tokens and forward of its RuntimePart; weights "
    "that were gathered or kept before the last step",
)
UNTOUCHED = Law(
    "it leaves alone what is the user's: batches, random generators, training or evaluation mode",
    "batch of its RuntimePart, which returns a new mapping of new tensors; seeds, which are a generator's of its own; "
    "calls of train() or eval()",
)
STEPS = Law(
    "the optimizer that it hands out is the user's, and steps each group by the user's options, also after they have "
    "changed",
    "optimizer of its RuntimePart: param_groups of what it returns are what steps, one for each that the user gave",
)
UNCHANGED = Law(
    "explain() and traffic() leave a model that they are asked about as it is",
    "what the hook does with its argument model, which is the user's",
)
FROZEN = Law(
    "parameters that are frozen after loading stay as they are and the others train as on one process",
    "hooks on parameters that assume a gradient for each of them",
)
TIED = Law(
    "a tied weight stays one parameter and gets the gradients of both of its uses",
    "code that replaces or clones parameters by name: lm_head.weight is model.embed_tokens.weight",
)
COMPOSES = Law(
    "it computes what one process computes with every strategy and axis that it says it composes with, and beside a "
    "strategy with every axis that build accepts",
    "composes_with, which should list only what is tested; validate, which refuses the axes that it is not exact "
    "beside; the group and divisor of its collectives (Role.TOKENS); DTensors where it expects whole tensors",
)
RESUMES = Law(
    "a run that is saved and loaded, twice, goes on as if it had never stopped, bit for bit",
    "state that no checkpoint has: return it in PluginState; optimizer state that is not in .state; import_state, "
    "which must undo export_state",
)
CROSSES = Law(
    "its checkpoint goes on under the default strategy and another's under it, with the same weights and numbers",
    "export_state and import_state: Hugging Face names, whole shapes, DTensors for shards, rows in order",
)
EXPORTS = Law(
    "an export has the weights that were trained and the model's configuration, as plain transformers reads them",
    "export_state, which must hand out every parameter in its order; buffers and settings that it puts into the model",
)
LEAVES_NOTHING = Law(
    "a closed runtime leaves no process groups, threads or patches behind",
    "groups made for each runtime: ask mesh.group(), or make one and keep it; close of its RuntimePart",
)
TWO_SETUPS = Law(
    "two setups in one process train as each would alone",
    "state in modules or on classes that both setups share; keep it on what the runtime hook returns",
)
DISAGREES = Law(
    "where ranks select different plugins, every rank raises an error that names them, and none waits",
    "collectives in planning hooks, which run before ranks have agreed",
)

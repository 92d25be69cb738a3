"""The options of commands that take a setup: one class, from which every such command gets them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, get_type_hints

import attrs
import typer

from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.planning.validation import MOST_RANKS, shown, whole_number
from nemo_dist.setup.selection import DEFAULT
from nemo_dist.setup.setup import DistributedSetup

P = ParamSpec("P")
_NO_NAMES: Any = ()  # as the default of an option that may be repeated: typer wants a list, a frozen value a tuple

WorldSize = Annotated[int, typer.Option("--world-size", "-n", help="How many ranks to plan for.", show_default=False)]
Config = Annotated[
    Path | None, typer.Option("--config", help="Take everything from the `distributed:` section of this YAML file.")
]

StoredDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="The dtype of stored parameters; that of the recipe, else of the model's config."),
]


@attrs.frozen(kw_only=True)
class SetupOptions:
    """The strategy and the sizes that a user asks for on the command line."""

    strategy: Annotated[str, typer.Option(help="A strategy plugin; `nemo-dist plugins` lists them.")] = DEFAULT
    tp: Annotated[int, typer.Option("--tp", help="Tensor-parallel size.")] = 1
    pp: Annotated[int, typer.Option("--pp", help="Pipeline-parallel size.")] = 1
    cp: Annotated[int, typer.Option("--cp", help="Context-parallel size.")] = 1
    ep: Annotated[int, typer.Option("--ep", help="Expert-parallel size.")] = 1
    dp: Annotated[int | None, typer.Option("--dp", help="Data-parallel size; what is left when omitted.")] = None
    dp_replicate: Annotated[int | None, typer.Option("--dp-replicate", help="Replicas of each shard (HSDP).")] = None
    plugin: Annotated[list[str], typer.Option(metavar="NAME", help="A further plugin; may be repeated.")] = attrs.field(
        default=_NO_NAMES, converter=tuple
    )
    axis: Annotated[list[str], typer.Option(metavar="NAME=SIZE", help="Size of an axis of a plugin.")] = attrs.field(
        default=_NO_NAMES, converter=tuple
    )

    @property
    def given(self) -> dict[str, Any]:
        """The sizes that are not None, by their names in ParallelismSizes."""
        other = ("strategy", "plugin", "axis")
        sizes = attrs.asdict(self, filter=lambda field, value: field.name not in other and value is not None)
        named = {f"{axis}_size": size for axis, size in sizes.items()}
        return named | {"extra": dict(map(_named_size, self.axis))} if self.axis else named

    @property
    def sizes(self) -> ParallelismSizes:
        """The requested sizes."""
        return ParallelismSizes(**self.given)

    def keywords(self, config: Path | None) -> dict[str, Any]:
        """Return the keywords of ``DistributedSetup.build``, from the YAML file *config* where one is given.

        Raises ValueError where both ask for something.
        """
        if config is None:
            return {"strategy": self.strategy, "parallelism_sizes": self.sizes, "plugins": tuple(self.plugin)}
        if self != SetupOptions():
            raise ValueError("--config gives the strategy and every size; leave the other options out, or --config")
        from nemo_dist.plugin.registry import Registry
        from nemo_dist.setup.config_section import build_keywords
        from nemo_dist.setup.yaml_section import read_yaml

        return build_keywords(read_yaml(config), Registry())

    def build(self, world_size: int, config: Path | None) -> DistributedSetup:
        """Return the setup for *world_size* ranks."""
        return DistributedSetup.build(**self.keywords(config), world_size=world_size)


def stored_dtype(dtype: str | None, config: Path | None) -> str | None:
    """Return the dtype of parameters that is asked for, as *dtype* or by the recipe *config*; None is the model's own.

    Raises ValueError for one that is none.
    """
    if dtype is not None:
        from nemo_dist.plugin.mixed_precision import storage_dtype

        return storage_dtype("--dtype", dtype)
    if config is None:
        return None
    from nemo_dist.recipe.config import stored_dtype as of_recipe

    return of_recipe(config)


def _named_size(text: str) -> tuple[str, int]:
    """Return the name and size in *text*, ``NAME=SIZE``; raise ValueError for another form."""
    name, _, digits = text.partition("=")
    size = whole_number(digits, MOST_RANKS)
    if not name or size is None:
        raise ValueError(f"--axis must be NAME=SIZE, as in --axis rows=2 (got {shown(text)})")
    return name, size


def takes_setup(command: Callable[Concatenate[SetupOptions, P], None]) -> Callable[..., None]:
    """Give *command* the fields of SetupOptions as options, in place of its first parameter."""
    hints = get_type_hints(SetupOptions, include_extras=True)
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in attrs.fields(SetupOptions)
    ]
    names = {option.name for option in options}
    first, *others = inspect.signature(command, eval_str=True).parameters.values()
    own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in others]
    required = [one for one in own if one.default is inspect.Parameter.empty]
    optional = [one for one in own if one.default is not inspect.Parameter.empty]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        asked = SetupOptions(**{name: values.pop(name) for name in names})
        run: Any = command
        run(**{first.name: asked, **values})

    signature = inspect.Signature([*required, *options, *optional])
    with_options.__signature__ = signature  # type: ignore[attr-defined]
    with_options.__annotations__ = {one.name: one.annotation for one in signature.parameters.values()}
    return with_options

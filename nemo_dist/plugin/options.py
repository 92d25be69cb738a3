"""Define the config class of a plugin: a frozen value class that rejects unknown keywords."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, TypeVar, dataclass_transform

import attrs

from nemo_dist.errors import UnknownNameError
from nemo_dist.planning import validation
from nemo_dist.planning.validation import FrozenMapping, near

T = TypeVar("T")
Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(attrs.field,))
def options(plugin: str) -> Callable[[type[T]], type[T]]:
    """Turn a class into the config of *plugin*: frozen, keyword-only, with a TypeError for an unknown keyword."""

    def decorate(cls: type[T]) -> type[T]:
        cls.plugin = plugin  # type: ignore[attr-defined]
        made = attrs.frozen(cls, kw_only=True)
        init = made.__init__

        @wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            if args:
                raise TypeError(f"{cls.__name__} takes keywords only (got {args!r}); {_valid(made)}")
            for name in kwargs:
                if name not in option_names(made):
                    raise TypeError(
                        f"{cls.__name__} has no option {name!r}{near(name, option_names(made))}; {_valid(made)}"
                    )
            init(self, *args, **kwargs)

        made.__init__ = checked  # type: ignore[method-assign]
        return made

    return decorate


def from_mapping(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """Return ``cls(**values)``; raise UnknownNameError (a ValueError) that names *what* for an unknown key."""
    for key in values:
        if key not in option_names(cls):
            raise UnknownNameError(
                f"{what} has an unknown key {key!r}{near(str(key), option_names(cls))}; {_valid(cls)}"
            )
    return cls(**values)


def option_names(cls: type) -> list[str]:
    """Return the keywords that the config class *cls* takes."""
    return [field.alias or field.name for field in attrs.fields(cls) if field.init]


def _valid(cls: type) -> str:
    return f"valid names: {', '.join(option_names(cls)) or 'none'}"


def boolean(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Validate that *value* is True or False; raise TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{_where(instance, attribute)} must be True or False (got {value!r})")


def integer(at_least: int) -> Validator:
    """Return a validator for an int of at least *at_least*; it rejects a bool."""

    def judge(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        validation.integer(_where(instance, attribute), value, at_least)

    return judge


def one_of(choices: Collection[Any]) -> Validator:
    """Return a validator for one of *choices*; it raises ValueError with the nearest match."""

    def judge(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in choices:
            hint = (
                near(value, [choice for choice in choices if isinstance(choice, str)]) if isinstance(value, str) else ""
            )
            valid = ", ".join(map(repr, choices))
            raise ValueError(f"{_where(instance, attribute)} must be one of {valid} (got {value!r}){hint}")

    return judge


def frozen_mapping(value: Any) -> Any:
    """Convert a dict to a FrozenMapping; return anything else unchanged."""
    return FrozenMapping(value) if isinstance(value, dict) else value


def _where(instance: Any, attribute: attrs.Attribute[Any]) -> str:
    return f"{type(instance).__name__}.{attribute.name}"

"""Define the config class of a plugin: a frozen value class that rejects unknown keywords."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import wraps
from typing import Any, TypeVar, dataclass_transform

import attrs

from nemo_dist.errors import UnknownNameError
from nemo_dist.planning import validation
from nemo_dist.planning.validation import FrozenMapping, near, same, shown

T = TypeVar("T")
Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


@attrs.frozen(kw_only=True)
class Fixed:
    """An option of NeMo AutoModel that cannot be chosen here.

    ``values``: those that ask for what happens anyway, which are accepted. ``instead``: what to do about others.
    """

    values: tuple[Any, ...]
    instead: str

    def judge(self, where: str, value: Any) -> None:
        """Raise ValueError for a *value* that asks for something else."""
        if not any(type(value) is type(one) and same(value, one) for one in self.values):
            listed = " or ".join(map(shown, self.values))
            raise ValueError(f"{where} can only be {listed} here (got {shown(value)}): {self.instead}")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(attrs.field,))
def options(
    plugin: str, fixed: Mapping[str, Fixed] | None = None, renamed: Mapping[str, str] | None = None
) -> Callable[[type[T]], type[T]]:
    """Turn a class into the config of *plugin*: frozen, keyword-only, with a TypeError for an unknown keyword.

    *fixed*: further keywords, which are judged and dropped. *renamed*: further names of options. ``to_dict`` of the
    class returns its options by name, as they are.
    """

    def decorate(cls: type[T]) -> type[T]:
        cls.plugin = plugin  # type: ignore[attr-defined]
        cls.fixed, cls.renamed = dict(fixed or {}), dict(renamed or {})  # type: ignore[attr-defined]
        cls.to_dict = _to_dict  # type: ignore[attr-defined]
        made = attrs.frozen(cls, kw_only=True)
        init = made.__init__

        @wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            if args:
                raise TypeError(f"{cls.__name__} takes keywords only (got {shown(args)}); {_valid(made)}")
            init(self, **_own(made, kwargs))

        made.__init__ = checked  # type: ignore[method-assign]
        return made

    return decorate


def _own(cls: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is *given* under the names of fields; raise TypeError for an unknown or repeated name."""
    own: dict[str, Any] = {}
    for name, value in given.items():
        if name in cls.fixed:
            cls.fixed[name].judge(f"{cls.__name__}.{name}", value)
            continue
        field = cls.renamed.get(name, name)
        if field not in option_names(cls):
            raise TypeError(f"{cls.__name__} has no option {shown(name)}{near(name, option_names(cls))}; {_valid(cls)}")
        if field in own:
            raise TypeError(f"{cls.__name__}: {name!r} is another name of {field!r}, which is given too; leave one out")
        own[field] = value
    return own


def _to_dict(self: Any) -> dict[str, Any]:
    """Return the options by name, as they are."""
    return {name: getattr(self, name) for name in option_names(type(self))}


def from_mapping(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """Return ``cls(**values)``; raise UnknownNameError (a ValueError) that names *what* for an unknown key.

    Raises TypeError for *values* that are no mapping.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} must be a mapping from options to values (got {shown(values)})")
    for key in values:
        if key not in accepted_names(cls):
            raise UnknownNameError(
                f"{what} has an unknown key {shown(key)}{near(key, option_names(cls))}; {_valid(cls)}"
            )
    return cls(**values)


def option_names(cls: type) -> list[str]:
    """Return the options of the config class *cls*."""
    return [field.alias or field.name for field in attrs.fields(cls) if field.init]


def accepted_names(cls: type) -> list[str]:
    """Return the keywords that the config class *cls* takes: its options, further names of them, and fixed ones."""
    return [*option_names(cls), *getattr(cls, "renamed", ()), *getattr(cls, "fixed", ())]


def _valid(cls: type) -> str:
    return f"valid names: {', '.join(option_names(cls)) or 'none'}"


def boolean(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Validate that *value* is True or False; raise TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{_where(instance, attribute)} must be True or False (got {shown(value)})")


def integer(at_least: int) -> Validator:
    """Return a validator for an int of at least *at_least*; it rejects a bool."""

    def judge(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        validation.integer(_where(instance, attribute), value, at_least)

    return judge


def one_of(choices: Collection[Any]) -> Validator:
    """Return a validator for one of *choices*; it raises ValueError with the nearest match."""

    def judge(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not any(same(value, choice) for choice in choices):
            hint = (
                near(value, [choice for choice in choices if isinstance(choice, str)]) if isinstance(value, str) else ""
            )
            valid = ", ".join(map(repr, choices))
            raise ValueError(f"{_where(instance, attribute)} must be one of {valid} (got {shown(value)}){hint}")

    return judge


def tp_rules(value: Any) -> Any:
    """Freeze a tensor-parallel plan, a dict from module names to styles; keep None, refuse what is neither."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for item in value.items() for text in item):
        raise TypeError(f"tp_plan must be a dict from module names to styles (got {shown(value)})")
    return FrozenMapping(dict(value))


def _where(instance: Any, attribute: attrs.Attribute[Any]) -> str:
    return f"{type(instance).__name__}.{attribute.name}"

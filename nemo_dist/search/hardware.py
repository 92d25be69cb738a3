"""Describe devices and the network between them: numbers from a small file that a user can copy and edit; no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from nemo_dist.errors import UnknownNameError
from nemo_dist.planning.device_flops import BFLOAT16, bfloat16_flops
from nemo_dist.planning.mesh_plan import MeshPlan
from nemo_dist.planning.validation import integer, near, shown
from nemo_dist.plugin.options import from_mapping
from nemo_dist.setup.yaml_section import read_recipe

FILE = Path(__file__).with_name("hardware.yaml")
_UNITS: dict[str, int] = {"": 1, "b": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("kmgt", 1)
    for kind, base in (("b", 1000), ("ib", 1024))
}
_SPELLED = ("B", "KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB")


def parse_bytes(text: Any, what: str = "memory") -> int:
    """Return the number of bytes that *text* says, as ``80GiB`` or ``80GB``; raise ValueError that names the units."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].lower() not in _UNITS:
        unit = found[2] if found else ""
        hint = near(unit, _SPELLED) if unit else ""
        raise ValueError(
            f"{what} must be a number with a unit, as 80GiB (got {shown(text)}){hint}; units: {', '.join(_SPELLED)}"
        )
    amount = float(found[1]) * _UNITS[found[2].lower()]
    if not 1 <= amount < math.inf:
        raise ValueError(f"{what} must be a number of bytes from 1 up, and finite (got {shown(text)})")
    return round(amount)


def _above_0(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{field.name} must be a number above 0 (got {shown(value)})")


def _rates(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{field.name} must map names of dtypes to numbers (got {shown(value)})")
    for number in value.values():
        _above_0(_, field, number)


@attrs.frozen(kw_only=True)
class Hardware:
    """One kind of device in nodes; the file ``hardware.yaml`` says what each number is, and its unit."""

    name: str = ""
    device: str = attrs.field(default="")
    flops: Mapping[str, float] = attrs.field(validator=_rates)
    compute_efficiency: float = attrs.field(validator=_above_0)
    memory: int = attrs.field(converter=parse_bytes)
    memory_bandwidth: float = attrs.field(validator=_above_0)
    memory_efficiency: float = attrs.field(validator=_above_0)
    node: int = attrs.field(validator=lambda self, field, value: integer(field.name, value))
    inside: float = attrs.field(validator=_above_0)
    between: float = attrs.field(validator=_above_0)
    network_efficiency: float = attrs.field(validator=_above_0)
    latency_inside: float = attrs.field(validator=_above_0)
    latency_between: float = attrs.field(validator=_above_0)

    @device.validator
    def _known(self, _: Any, value: str) -> None:
        if value and bfloat16_flops(value) is None:
            raise UnknownNameError(
                f"unknown device {shown(value)}{near(value, BFLOAT16)} (known: {', '.join(BFLOAT16)})"
            )

    @classmethod
    def named(cls, name: str) -> Hardware:
        """Return the hardware called *name*, of the file that ships or, as ``my.yaml:NAME``, of the user's own.

        Raises UnknownNameError (a ValueError) with the nearest match, and OSError for a file that cannot be read.
        """
        path, _, own = name.rpartition(":")
        file = Path(path) if path else FILE
        found = read_recipe(file)
        if own not in found:
            raise UnknownNameError(f"unknown hardware {shown(own)}{near(own, found)} (known: {', '.join(found)})")
        what = f"hardware {shown(own)}"
        if not isinstance(found[own], dict):
            raise ValueError(f"{what} of {file} must map names to numbers (got {shown(found[own])}); see {FILE}")
        try:
            return from_mapping(cls, {**found[own], "name": own}, what)
        except TypeError as error:  # a number that is missing
            raise ValueError(f"{what} of {file}: {error}; see {FILE}") from error

    def matrix_flops(self, dtype: str | None) -> float:
        """Return the FLOP/s that matrix products reach in *dtype*."""
        return self.peak(dtype) * self.compute_efficiency

    def peak(self, dtype: str | None) -> float:
        """Return the FLOP/s of the data sheet in *dtype*; None is float32."""
        stated = bfloat16_flops(self.device) if dtype in ("bfloat16", "float16") else None
        return self.flops.get(dtype or "float32") or stated or min(self.flops.values())

    def seconds(self, plan: MeshPlan, axis: str, sent: float, times: float) -> float:
        """Return how long *times* collectives along *axis* take in which a rank sends *sent* bytes in all.

        A group that is not within one node sends at the rate of the ports that its ranks in a node have together, but
        no faster than within the node.
        """
        size, step = plan.view_of(axis).span(axis)
        if size * step <= self.node:
            return sent / (self.inside * self.network_efficiency) + times * self.latency_inside
        here = max(1, self.node // step)
        return sent / (min(self.inside, self.between * here) * self.network_efficiency) + times * self.latency_between

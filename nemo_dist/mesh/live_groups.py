"""Keep process groups and meshes for as long as the default process group lives, so that equal setups share them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import attrs
import torch.distributed as dist

T = TypeVar("T")


@attrs.define(eq=False)
class LiveGroups:
    """What was created over the default process group, by what it was created from."""

    _world: Any = None  # the default process group that all of it belongs to
    _made: dict[Hashable, Any] = attrs.field(factory=dict)

    def kept(self, key: Hashable, create: Callable[[], T]) -> T:
        """Return what *create* returned for *key* over the process group of now, calling it the first time.

        Creating groups is collective, so ranks must ask for the same keys in the same order.
        """
        if self._world is not dist.group.WORLD:
            self.forget()
            self._world = dist.group.WORLD
        if key not in self._made:
            self._made[key] = create()
        found: T = self._made[key]
        return found

    def forget(self) -> None:
        """Create everything anew from now on; needed after groups other than the default one were destroyed."""
        self._made.clear()
        self._world = None


live = LiveGroups()

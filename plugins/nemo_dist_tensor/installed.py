"""Remember how each module was made tensor-parallel, for adapters that are added to it later."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import attrs
from torch import Tensor, nn

from nemo_dist_tensor import layers
from nemo_dist_tensor.collectives import Peers, split
from nemo_dist_tensor.parallel_regions import Region


@attrs.frozen(eq=False)
class Installed:
    """How a module was made tensor-parallel.

    ``head``: its output may stay cut. ``own_rows`` takes a rank's rows of what has a row for each output feature.
    """

    style: str
    region: Region
    head: layers.LMHead | None = None
    own_rows: Callable[[Tensor], Tensor] | None = None

    @property
    def peers(self) -> Peers:
        """The ranks that share the module."""
        return self.region.peers

    def rows(self, whole: Tensor) -> Tensor:
        """Return the rows of *whole* for this rank's output features."""
        return split(whole, 0, self.peers) if self.own_rows is None else self.own_rows(whole)

    def columns(self, whole: Tensor) -> Tensor:
        """Return the columns of *whole* for this rank's input features."""
        return split(whole, 1, self.peers)


_installed: WeakKeyDictionary[nn.Module, Installed] = WeakKeyDictionary()  # by module that a rule changed


def remember(module: nn.Module, installed: Installed) -> None:
    """Note how *module* was made tensor-parallel."""
    _installed[module] = installed


def installed_of(module: nn.Module) -> Installed | None:
    """Return how *module* was made tensor-parallel, None where no rule changed it."""
    return _installed.get(module)

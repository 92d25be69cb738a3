"""The settings of the demo, which the command line creates without torch and every rank reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import attrs

from nemo_dist.planning.sizes import ParallelismSizes
from nemo_dist.planning.validation import LARGEST_SEED, integer, number_of_ranks
from nemo_dist.plugin.protocol import declared
from nemo_dist.plugin.registry import Registry
from nemo_dist.setup.selection import DEFAULT, Selection
from nemo_dist.setup.setup import DistributedSetup

REPORT = "demo.json"  # next to the exported weights: the losses; marks a folder that the demo may overwrite
_BATCH = 16  # windows of a step over all ranks, unless the data-parallel size does not divide it
_EXACT = {"param_dtype": "float32", "reduce_dtype": "float32", "output_dtype": "float32"}


def _listed(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(names)


@attrs.frozen(kw_only=True)
class DemoOptions:
    """The demo's settings: ranks, strategy, sizes by the names of :class:`ParallelismSizes`, steps, folder and seed.

    ``plugins``: names of further plugins. ``moe``: train a mixture of experts. ``window``: bytes per sequence.
    """

    nproc: int = 4
    strategy: str = DEFAULT
    sizes: dict[str, Any] = attrs.field(factory=dict)
    plugins: tuple[str, ...] = attrs.field(default=(), converter=_listed)
    steps: int = 160
    out: Path = attrs.field(default=Path("nemo_dist_demo"), converter=Path)
    seed: int = 0
    moe: bool = False
    window: int = 128  # bytes
    lr: float = 2e-3

    def __attrs_post_init__(self) -> None:
        number_of_ranks("nproc", self.nproc)
        integer("steps", self.steps)
        integer("seed", self.seed, 0, LARGEST_SEED)
        if self.sizes.get("ep_size", 1) > 1 and not self.moe:
            raise ValueError(
                f"--ep {self.sizes['ep_size']} shares experts, which the Llama of the demo lacks; add --moe"
            )

    @classmethod
    def from_json(cls, text: str) -> DemoOptions:
        """Return the options that ``to_json`` wrote."""
        return cls(**json.loads(text))

    def to_json(self) -> str:
        """Return the options as one line of JSON."""
        return json.dumps(attrs.asdict(self) | {"out": str(self.out)})

    @property
    def parallelism_sizes(self) -> ParallelismSizes:
        """The requested sizes."""
        return ParallelismSizes(**self.sizes)

    @property
    def batch(self) -> int:
        """The windows per step over all ranks: 16, rounded up to a multiple of the data-parallel size."""
        dp = self.parallelism_sizes.dp(self.nproc)
        return -(-_BATCH // dp) * dp

    def setup(self, world_size: int | None = None, device_type: str | None = None) -> DistributedSetup:
        """Build the setup, with all computation in float32, so that export and trained model can be compared."""
        config_type: Any = Selection(Registry()).strategy_type(self.strategy).config_type
        known = attrs.fields_dict(config_type) if attrs.has(config_type) else {}
        return DistributedSetup.build(
            strategy=config_type(mp_policy=_EXACT) if "mp_policy" in known else config_type(),
            parallelism_sizes=self.parallelism_sizes,
            plugins=self.plugins,
            pipeline_config=self._pipeline,
            world_size=self.nproc if world_size is None else world_size,
            device_type=device_type,
        )

    @property
    def exact(self) -> bool:
        """Whether the exported model must compute what the ranks compute: no plugin changes what is computed."""
        return all(declared(plugin, "exact") for plugin in self.setup().plugins)

    @property
    def _pipeline(self) -> dict[str, int] | None:
        """The pipeline config: only two microbatches per stage, as small microbatches mostly communicate."""
        stages = self.parallelism_sizes.pp_size
        rows = self.batch // self.parallelism_sizes.dp(self.nproc)
        return {"pp_microbatch_size": max(1, rows // (2 * stages))} if stages > 1 else None

    def claim_folder(self) -> None:
        """Raise ValueError when the output folder is a file, or contains files that the demo did not write."""
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file; name a folder")
        if self.out.is_dir() and any(self.out.iterdir()) and not (self.out / REPORT).is_file():
            raise ValueError(f"--out {self.out} holds files that the demo did not write; name another folder")

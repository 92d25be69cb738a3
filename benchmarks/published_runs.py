"""Estimate published training runs with ``nemo_dist.search``, for the table in ``docs/search.md``; needs no GPU.

python benchmarks/published_runs.py [part of a name]
"""

from __future__ import annotations

import sys
from typing import Any

import attrs
from transformers import DeepseekV3Config, LlamaConfig, MixtralConfig

from nemo_dist.search.hardware import Hardware
from nemo_dist.search.model import SearchedModel
from nemo_dist.search.paste import short
from nemo_dist.search.ranking import Answer, Question, search
from nemo_dist.search.space import Space

LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
LLAMA_8B = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **LLAMA)
LLAMA_70B = LlamaConfig(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **LLAMA
)
LLAMA_405B = LlamaConfig(
    hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, **LLAMA
)
MIXTRAL = MixtralConfig(
    hidden_size=6144,
    intermediate_size=16384,
    num_hidden_layers=56,
    num_attention_heads=48,
    num_key_value_heads=8,
    vocab_size=32768,
)


@attrs.frozen(kw_only=True)
class Run:
    """A run as it was published; ``fixed`` are its sizes; ``memory`` of a device in bytes, None as the hardware says.

    ``beside``: those that stay so where it is ranked; with all of them, the options that plugins find worth trying.
    """

    name: str
    config: Any
    hardware: str
    gpus: int
    fixed: dict[str, int]
    beside: dict[str, int]
    modes: tuple[bool | str, ...]
    batch: int
    length: int
    memory: int | None = None

    def search(self, fixed: dict[str, int], options: bool) -> Answer:
        """Search with these sizes *fixed*."""
        space = Space(
            world_size=self.gpus,
            fixed=fixed,
            bounds={"tp": 8},
            strategies=("fsdp2",),
            modes=self.modes,
            options=options,
        )
        hardware = Hardware.named(self.hardware)
        return search(
            Question(
                space=space,
                model=SearchedModel(self.config),
                hardware=hardware,
                memory=self.memory or hardware.memory,
                batch=self.batch,
                length=self.length,
                rows=2,
            )
        )


ALONE = {"pp": 1, "tp": 1, "cp": 1, "ep": 1, "dp_replicate": 1}
RUNS = [
    Run(
        name="Llama 3 8B",
        config=LLAMA_8B,
        hardware="a100-8x",
        gpus=64,
        fixed=ALONE,
        beside={"cp": 1, "ep": 1},
        modes=("selective",),
        batch=64,
        length=8192,
    ),
    Run(
        name="Llama 3.1 8B",
        config=LLAMA_8B,
        hardware="h100-8x",
        memory=96 * 10**9,
        gpus=8,
        fixed=ALONE,
        beside={"cp": 1, "ep": 1},
        modes=("selective",),
        batch=16,
        length=8192,
    ),
    Run(
        name="Llama 3 70B",
        config=LLAMA_70B,
        hardware="a100-8x",
        gpus=64,
        fixed=ALONE,
        beside={"cp": 1, "ep": 1},
        modes=(True,),
        batch=64,
        length=8192,
    ),
    Run(
        name="Llama 3 405B",
        config=LLAMA_405B,
        hardware="h100-8x",
        gpus=8192,
        fixed=ALONE | {"tp": 8, "pp": 16},
        beside=ALONE | {"tp": 8, "pp": 16},
        modes=(False, "selective", True),
        batch=2048,
        length=8192,
    ),
    Run(
        name="Mixtral 8x22B",
        config=MIXTRAL,
        hardware="h100-8x",
        gpus=128,
        fixed=ALONE | {"tp": 4, "pp": 8, "ep": 2},
        beside=ALONE | {"tp": 4, "pp": 8, "ep": 2},
        modes=(False, "selective", True),
        batch=256,
        length=4096,
    ),
    Run(
        name="DeepSeek-V3",
        config=DeepseekV3Config(),
        hardware="h800-8x",
        gpus=2048,
        fixed=ALONE | {"pp": 16, "ep": 64},
        beside=ALONE | {"pp": 16, "ep": 64},
        modes=(False, "selective", True),
        batch=15360,
        length=4096,
    ),
]


def said(answer: Answer) -> str:
    """Return what a search found of one topology in a line."""
    if not answer.ranked:
        nearest = answer.nearest
        return f"does not fit: {nearest.bytes / 2**30:.1f} GiB" if nearest else f"refused: {dict(answer.refused)}"
    best = answer.ranked[0]
    slowest = sorted(best.times.items(), key=lambda entry: -entry[1])[:3]
    times = ", ".join(f"{name} {seconds / best.seconds:.0%}" for name, seconds in slowest)
    return (
        f"{best.tokens_per_second:,.0f} tokens/s/GPU, {best.mfu:.1%} MFU, {best.bytes / 2**30:.1f} GiB of "
        f"{short(best.topology)}; {times}"
    )


def main(wanted: str) -> None:
    """Print every run whose name contains *wanted*."""
    for run in RUNS:
        if wanted not in run.name:
            continue
        published = run.search(run.fixed, False)
        others = run.search(run.beside, run.beside == run.fixed)
        print(f"{run.name}: {said(published)}", flush=True)
        if published.ranked:
            rank = 1 + sum(one.seconds < published.ranked[0].seconds for one in others.ranked)
            print(f"  number {rank} of {len(others.ranked)}", flush=True)
        print(f"  first: {said(others)}", flush=True)


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))

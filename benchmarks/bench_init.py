"""What a rank spends on the initial weights of a new model of some 350 million parameters, drawn by slices.

``from_config(init="slices")`` on four ranks against the same on one: each draws a quarter. CPU time of the whole call,
of the worst rank; a tiny model is made first, so that imports are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from figures import Figure
from ranks import on_ranks
from transformers import LlamaConfig

from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM

TITLE = "Making a model of 355 M parameters from its config, drawn by slices"
WORLD = 4
_SAMPLES = 2
_LIMIT = 1 / 3


def measure() -> Iterator[Figure]:
    """Yield the CPU time of a rank of four, against that of one process alone."""
    pairs = [(max(on_ranks(WORLD, make)), max(on_ranks(1, make))) for _ in range(_SAMPLES)]
    ours, peer = zip(*pairs, strict=True)
    yield Figure(what="CPU time", unit="s", ours=ours, peer=peer, against="on one rank", limit=_LIMIT)


def make() -> float:
    """Run on every rank: make a tiny model and a large one; return the CPU seconds of the large one."""
    setup = DistributedSetup.build()
    _made(setup, hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256)
    start = time.process_time()
    _made(setup, hidden_size=1024, intermediate_size=2560, num_hidden_layers=24, vocab_size=32000)
    return time.process_time() - start


def _made(setup: DistributedSetup, **sizes: Any) -> Any:
    config = LlamaConfig(num_attention_heads=sizes["hidden_size"] // 64, tie_word_embeddings=False, **sizes)
    return NeMoAutoModelForCausalLM.from_config(config, distributed_setup=setup, dtype=torch.float32, init="slices")

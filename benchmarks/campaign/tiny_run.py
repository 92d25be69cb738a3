"""A tiny training run that is determined: after a resume it computes the bits that it would have computed anyway."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from nemo_dist import DistributedSetup, NeMoAutoModelForCausalLM, ParallelismSizes, RunFolder, initialize_distributed
from nemo_dist.checkpoint.chunks import as_bytes
from nemo_dist.mesh.dtensor import local

_WORDS = 32


class Position:
    """Stands for a data loader: it counts the batches that it gave."""

    def __init__(self) -> None:
        self.given = 0

    def batch(self) -> dict[str, torch.Tensor]:
        """Return the next batch, which depends only on how many there were."""
        self.given += 1
        tokens = torch.randint(1, _WORDS, (2, 6), generator=torch.Generator().manual_seed(self.given))
        return {"input_ids": tokens, "labels": tokens}

    def state_dict(self) -> dict[str, int]:
        """Return the state."""
        return {"given": self.given}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load the state."""
        self.given = state["given"]


def config() -> Any:
    """Return a config with dropout, so that the generators matter."""
    return transformers.LlamaConfig(
        vocab_size=_WORDS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.1,
    )


class TinyRun:
    """A model with optimizer, scheduler and data; ``origin`` is a folder to load it from, or None for a new model."""

    def __init__(self, sizes: Mapping[str, int] | None = None, origin: Path | None = None) -> None:
        initialize_distributed("gloo", timeout_minutes=1)
        setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(**(sizes or {})))
        torch.manual_seed(0)
        given = {"distributed_setup": setup, "dtype": torch.float32}
        if origin is None:
            model = NeMoAutoModelForCausalLM.from_config(config(), **given)
        else:
            model = NeMoAutoModelForCausalLM.from_pretrained(origin, **given)
        self.runtime = setup.runtime(model)
        self.optimizer = self.runtime.optimizer(torch.optim.AdamW, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.999)
        self.data = Position()
        self.step = self.begun = 0

    @property
    def also(self) -> dict[str, Any]:
        """What is saved and loaded beside the optimizer."""
        return {"schedulers": [self.scheduler], "data": self.data}

    def train(self) -> None:
        """Take one step."""
        self.runtime.forward_backward(self.data.batch())
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1

    def save(self, folder: RunFolder, **options: Any) -> Any:
        """Save this step."""
        return folder.save(
            self.runtime, self.optimizer, step=self.step, extra={"step": self.step}, **self.also, **options
        )

    def resume(self, folder: RunFolder) -> bool:
        """Go on from the newest checkpoint; return whether there was one."""
        found = folder.resume(self.runtime, self.optimizer, **self.also)
        self.step = self.begun = 0 if found is None else found[0]
        if found is not None and found[1] != {"step": self.step}:
            raise AssertionError(f"step {found[0]} came back with extra {found[1]}")
        return found is not None

    def weights(self) -> dict[str, torch.Tensor]:
        """Return views of this rank's weights."""
        return {name: local(parameter).detach() for name, parameter in self.runtime.named_parameters()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return views of this rank's weights and moments, and its generator."""
        found = self.weights()
        for name, parameter in self.runtime.named_parameters():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    found[f"{kind}/{name}"] = local(value)
        return found | {"generator": torch.get_rng_state()}

    def digest(self) -> int:
        """Return a checksum of all that this rank would save."""
        said = repr((self.scheduler.state_dict(), self.data.state_dict(), self.step)).encode()
        return checksum(self.tensors(), zlib.crc32(said))


def checksum(tensors: Mapping[str, torch.Tensor], found: int = 0) -> int:
    """Return a checksum of *tensors* and their names."""
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(as_bytes(tensor.cpu()).numpy().tobytes(), zlib.crc32(name.encode(), found))
    return found

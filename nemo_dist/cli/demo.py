"""The demo as each rank runs it: train a small byte-level model on real text and export it; then check the export."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig
from transformers.utils.logging import disable_progress_bar

from nemo_dist.cli.demo_config import REPORT, DemoOptions
from nemo_dist.cli.demo_dataset import Windows, collate
from nemo_dist.mesh.process_group import initialize_distributed
from nemo_dist.models.auto_model import NeMoAutoModelForCausalLM
from nemo_dist.recipe.progress import Report, progress
from nemo_dist.training.runtime import Runtime

_TOLERANCE = 1e-4  # relative difference of the losses; float32 sums in another order differ by less
_PROMPT = b"def "
_WARMUP = 20  # steps


def main() -> None:
    """Run the demo as one rank; the only argument is its options as JSON."""
    options = DemoOptions.from_json(sys.argv[1])
    env = initialize_distributed("gloo" if device_type(options) == "cpu" else None)
    setup = options.setup(world_size=env.world_size, device_type=device_type(options))
    torch.manual_seed(options.seed)
    model: Any = NeMoAutoModelForCausalLM.from_config(config(options.moe), distributed_setup=setup)
    runtime = setup.runtime(model)
    with progress(options.steps, 0, max(1, options.steps // 10), env.is_main) as report:
        losses = train(runtime, options, report)
    loss = held_out_loss(runtime, options)
    runtime.export(options.out)
    if env.is_main:
        (options.out / REPORT).write_text(json.dumps({"losses": losses, "held_out_loss": loss}, indent=1) + "\n")
    torch.distributed.destroy_process_group()


def device_type(options: DemoOptions) -> str:
    """Return "cuda" when there is a GPU for every rank, else "cpu"."""
    return "cuda" if torch.cuda.device_count() >= options.nproc else "cpu"


def config(moe: bool) -> PretrainedConfig:
    """Return the config of the demo's byte-level model: a Llama of 1.25 M parameters or, with *moe*, a Qwen3-MoE."""
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if not moe:
        return LlamaConfig(**sizes)
    experts: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 112, "head_dim": 20}
    return Qwen3MoeConfig(**sizes, **experts, norm_topk_prob=True, output_router_logits=True)


def train(runtime: Runtime, options: DemoOptions, report: Report) -> list[float]:
    """Train for ``options.steps`` steps and return the loss of each; the batches are the same for every topology."""
    optimizer = runtime.optimizer(torch.optim.AdamW, lr=options.lr)
    losses: list[float] = []
    for batch in _batches(runtime, options, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * _pace(len(losses), options.steps)
        loss = runtime.forward_backward(batch)
        runtime.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        report(len(losses), {"loss": losses[-1]})
    return losses


def _pace(step: int, steps: int) -> float:
    """Return the learning-rate factor at *step*, from 0: linear warm-up, then linear decay over the last 40 %."""
    return min(1.0, (step + 1) / _WARMUP, (steps - step) / (0.4 * steps))


def held_out_loss(runtime: Runtime, options: DemoOptions) -> float:
    """Return the mean token loss of the distributed model on the held-out batch; leaves no gradients behind."""
    (batch,) = _batches(runtime, options, 1, held_out=True)
    loss = runtime.forward_backward(batch).item()
    for _, parameter in runtime.named_parameters():
        parameter.grad = None
    return loss


def _batches(runtime: Runtime, options: DemoOptions, steps: int, held_out: bool = False) -> Iterator[Mapping[str, Any]]:
    """Yield, per step, the part of the batch for this data-parallel rank."""
    windows = Windows(steps * options.batch, options.window, options.seed, held_out)
    sampler: Any = DistributedSampler(windows, num_replicas=runtime.dp_size, rank=runtime.dp_rank, shuffle=False)
    size = options.batch // runtime.dp_size
    return iter(DataLoader(windows, batch_size=size, sampler=sampler, collate_fn=collate))


@attrs.frozen
class Verdict:
    """What plain transformers computes with the export: the held-out loss, beside that of the ranks, and a sample."""

    first_loss: float
    last_loss: float
    distributed: float
    exported: float
    sample: str

    @property
    def difference(self) -> float:
        """The relative difference of the two losses."""
        return abs(self.exported - self.distributed) / abs(self.distributed)

    @property
    def equal(self) -> bool:
        """Whether the exported model computes the loss that the ranks computed, within the tolerance."""
        return self.difference <= _TOLERANCE


def verify(options: DemoOptions) -> Verdict:
    """Load the export with plain transformers in this process, and compare its held-out loss with that of the ranks."""
    report = json.loads((options.out / REPORT).read_text())
    disable_progress_bar()  # a bar per file that is read is noise here
    model = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32).eval()
    windows = Windows(options.batch, options.window, options.seed, held_out=True)
    with torch.no_grad():
        loss = model(**collate([windows[index] for index in range(len(windows))])).loss.item()
    return Verdict(
        first_loss=report["losses"][0],
        last_loss=report["losses"][-1],
        distributed=report["held_out_loss"],
        exported=loss,
        sample=_sample(model, options.seed),
    )


def _sample(model: Any, seed: int, length: int = 240) -> str:
    torch.manual_seed(seed)
    prompt = torch.tensor([list(_PROMPT)])
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=length,
        do_sample=True,
        temperature=0.5,
        top_k=40,
        pad_token_id=0,
    )
    text = bytes(tokens[0].tolist()).decode("utf-8", errors="replace")
    # A barely trained model writes control characters too, which a terminal would execute.
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{MIDDLE DOT}" for letter in text)


if __name__ == "__main__":
    main()

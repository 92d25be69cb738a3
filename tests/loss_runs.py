"""Losses of a user's own, and trainings with them: on one process with plain transformers, and on ranks."""

from types import SimpleNamespace

import attrs
import torch
from torch.nn.functional import cross_entropy, log_softmax, pad

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, NeMoAutoModel, ParallelismSizes, PipelineConfig
from nemo_dist.losses import DPO, Contrastive, CrossEntropy, Distillation, top_k
from nemo_dist.testing.equivalence import (
    MAX_NORM,
    Outcome,
    Task,
    checkpoint,
    differences,
    merged,
    train_with,
)
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS


def setups():
    """Every kind of parallelism, and two pairs: ranks, specimen, what ``build`` gets."""

    def fsdp2(**sizes):
        return {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(**sizes)}

    stages = {"pipeline_config": PipelineConfig()}
    return {
        "fsdp2": (2, "llama", fsdp2()),
        "hsdp": (4, "llama", fsdp2(dp_replicate_size=2)),
        "ddp": (2, "llama", {"strategy": DDPConfig()}),
        "tp": (2, "llama", fsdp2(tp_size=2)),
        "cp": (2, "llama", fsdp2(cp_size=2)),
        "pp": (2, "llama", fsdp2(pp_size=2) | stages),
        "pp in pairs of rows": (
            2,
            "llama",
            fsdp2(pp_size=2) | {"pipeline_config": PipelineConfig(pp_microbatch_size=2)},
        ),
        "pp, filled up": (2, "llama", fsdp2(pp_size=2) | {"pipeline_config": PipelineConfig(pp_batch_size=12)}),
        "ep": (2, "qwen3-moe", fsdp2(ep_size=2)),
        "pp x tp": (4, "llama", fsdp2(pp_size=2, tp_size=2) | stages),
        "pp x cp": (4, "llama", fsdp2(pp_size=2, cp_size=2) | stages),
        "cp x tp": (4, "llama", fsdp2(cp_size=2, tp_size=2)),
    }


# ---- losses as users write them ----


def weighted(outputs, batch):
    """Cross entropy of the next token, with a weight for each row and each class."""
    labels = batch["labels"][:, 1:]
    losses = cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    weights = torch.where(labels < 0, 0.0, 0.5 + labels % 3)
    return losses, weights * batch["row_weight"][:, None]


def of_rows(outputs, batch):
    """Of every row the probability of its labels, as a sum over rows and their number."""
    labels = batch["labels"][:, 1:]
    found = log_softmax(outputs.logits[:, :-1], -1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    scores = (found * (labels >= 0)).sum(1)
    return (torch.sigmoid(scores / 10) * batch["row_weight"]).sum(), len(labels)


class OfTokens:
    """Cross entropy of every token by itself, which says so, and counts from the batch alone."""

    per_token = True

    def count(self, batch):
        return ((batch["shift_labels"] >= 0) * batch["token_weight"]).sum()

    def __call__(self, outputs, batch):
        labels = batch["shift_labels"]
        losses = cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return losses, (labels >= 0) * batch["token_weight"]


# Each is made for the ranks of a mesh, or, with None, for one process.
LOSSES = {
    "weighted": lambda mesh: weighted,
    "of rows": lambda mesh: of_rows,
    "of tokens": lambda mesh: OfTokens(),
    "class weights and z": lambda mesh: CrossEntropy(
        class_weights=torch.linspace(0.1, 2.0, 96), z_loss=0.01, label_smoothing=0.1
    ),
    "distillation": lambda mesh: Distillation(temperature=2.0, labels=0.3),
    "distillation from few tokens": lambda mesh: Distillation(),
    "dpo": lambda mesh: DPO(beta=0.3),
    "contrastive": lambda mesh: Contrastive(mesh=mesh or SimpleNamespace(group=lambda role: None)),
}
HEADLESS = {"contrastive"}  # trained with hidden states, of a model without a head


@attrs.frozen(kw_only=True)
class LossTask(Task):
    """A task with a loss of its own, by name, and batches with what that reads; ``routers``: with the router loss."""

    loss: str
    routers: bool = False

    def batches(self, step):
        made = super().batches(step)
        generator = torch.Generator().manual_seed(7 + step)
        for batch in made:
            rows, length = batch["input_ids"].shape
            batch["row_weight"] = torch.linspace(0.3, 2.0, rows)
            batch["token_weight"] = torch.rand((rows, length), generator=generator)
            if self.loss.startswith("distillation"):
                logits = torch.randn((rows, length, 96), generator=generator)
                batch |= top_k(logits, 5) if "few" in self.loss else {"teacher_logits": logits}
            if self.loss == "dpo":
                batch["reference_scores"] = torch.randn(rows, generator=generator)
            if self.loss in HEADLESS:
                lengths = torch.linspace(length, length // 2, rows).long()
                batch["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
        return made


def loader(task):
    """The class that loads the model of *task*."""
    return NeMoAutoModel if task.loss in HEADLESS else SPECIMENS[task.specimen].load


def reference(task):
    """Return what plain transformers and torch compute on one process on the whole batch."""
    model = loader(task).from_pretrained(checkpoint(task.specimen), dtype=torch.float32)
    loss = LOSSES[task.loss](None)
    optimizer = torch.optim.AdamW(model.parameters(), **task.optimizer)
    losses, norms, gradients = [], [], {}
    for step in range(task.steps):
        parts = []
        for batch in task.batches(step):
            batch["shift_labels"] = pad(batch["labels"], (0, 1), value=-100)[:, 1:]
            given = {n: v for n, v in batch.items() if n in ("input_ids", "attention_mask")}
            outputs = model(**given, use_cache=False, **({"output_router_logits": True} if task.routers else {}))
            one, weight = loss(outputs, batch)
            parts.append((one, weight) if one.ndim == 0 else ((one * weight).sum(), weight.sum()))
        total = sum(one for one, _ in parts) / sum(weight for _, weight in parts)
        if task.routers:
            total = total + model.config.router_aux_loss_coef * outputs.aux_loss
        total.backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=parameters)


def on_rank_train(task, folder, options):
    setup = DistributedSetup.build(**options)
    model = loader(task).from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    for part in [model] if isinstance(model, torch.nn.Module) else model.parts:
        part.config.output_router_logits = task.routers  # a term that is not the user's
    return train_with(task, setup.runtime(model, loss=LOSSES[task.loss](setup.mesh_context)))


def assert_as_one_process(ranks, task, name):
    """Assert that training *task* under the setup called *name* is training it on one process."""
    world, _, options = setups()[name]
    found = merged(ranks(world).run(on_rank_train, task, checkpoint(task.specimen), options))
    lines = differences(found, reference(task))
    assert not lines, "not what one process computes:\n" + "\n".join(lines)

"""Faults of the kinds that distributed training is known for, each planted by a few lines in the processes of ranks.

A mutant is a context manager: ``verify(..., around=it)`` enters it on every rank, and one process runs without.
"""

from contextlib import contextmanager
from unittest.mock import patch

import attrs
import torch
import torch.distributed as dist
from torch.nn.functional import pad

import nemo_dist_context.apply
import nemo_dist_tensor.apply
from nemo_dist.hf_model import blocks
from nemo_dist.mesh.dtensor import local
from nemo_dist.setup.setup import DistributedSetup
from nemo_dist.torch_private import in_backward
from nemo_dist.training import grad_norm, runtime
from nemo_dist.training.batch_loop import BatchLoop
from nemo_dist.training.router_aux_loss import RouterLoss


@contextmanager
def instead(owner, name, make):
    """Replace ``owner.name`` by ``make(what is there)`` while the context is open.

    Not in the proofs of a plan or an attention at load, which find such faults before there is anything to verify.
    """
    original, proving = getattr(owner, name), []
    changed = make(original)

    def either(*args, **options):
        return (original if proving else changed)(*args, **options)

    def without(prove):
        def run(*args, **options):
            proving.append(prove)
            try:
                return prove(*args, **options)
            finally:
                proving.pop()

        return run

    plan, attention = nemo_dist_tensor.apply, nemo_dist_context.apply
    with (
        patch.object(owner, name, either),
        patch.object(plan, "completed", without(plan.completed)),
        patch.object(attention, "require_splittable", without(attention.require_splittable)),
    ):
        yield


def in_every_part(change):
    """Call *change* with every part of the model on this rank, after its weights are loaded."""

    def make(wrap):
        def then(self, parts):
            for part in parts:
                change(part)
            return wrap(self, parts)

        return then

    return instead(DistributedSetup, "wrap", make)


# ---- tensor parallelism ----


def row_output_not_summed():
    from nemo_dist_tensor.parallel_regions import Region

    def make(leave):
        def without(self, partial, projection, bias):
            return (
                partial if projection == "model.layers.1.self_attn.o_proj" else leave(self, partial, projection, bias)
            )

        return without

    return instead(Region, "leave", make)


def bias_added_on_every_rank():
    from nemo_dist_tensor.parallel_regions import Region

    def make(leave):
        def early(self, partial, projection, bias):
            return leave(self, partial if bias is None else partial + bias, projection, None)

        return early

    return instead(Region, "leave", make)


def region_gradient_not_summed():
    from nemo_dist_tensor import parallel_regions

    return patch.object(parallel_regions, "fork", lambda value, peers: (value, value))


def shared_norm_gradient_not_summed():
    from nemo_dist_tensor import layers

    return patch.object(layers, "summed", lambda *given: None)


def sequence_norm_gradient_not_summed():
    from nemo_dist_tensor import block_structure

    return instead(block_structure, "summed", lambda summed: lambda *given: None)


def sequence_scattered_to_the_wrong_rank():
    from nemo_dist_tensor import parallel_regions

    def make(split):
        return lambda value, dim, peers: split(value, dim, attrs.evolve(peers, rank=peers.size - 1 - peers.rank))

    return instead(parallel_regions, "split", make)


def embedding_mask_off_by_one():
    from nemo_dist_tensor import layers
    from nemo_dist_tensor.collectives import Peers

    class OffByOne(Peers):
        def bounds(self, total):
            start, length = super().bounds(total)
            return start + bool(start), length

    def make(vocabulary):
        return lambda module, peers: vocabulary(module, OffByOne(peers.mesh, peers.group, peers.size, peers.rank))

    return instead(layers, "vocabulary", make)


def attention_scaled_twice_on_one_rank():
    def twice(model):
        for module in model.modules():
            if hasattr(module, "scaling") and dist.get_rank() == 1:
                module.scaling **= 2

    return in_every_part(twice)


def packed_experts_cut_as_one_matrix():
    from nemo_dist_tensor import parameter_sharding

    def make(of_parameter):
        return lambda style, tensor: of_parameter(style.removeprefix("packed_"), tensor)

    return instead(parameter_sharding, "of_parameter", make)


def norm_of_own_shards_only():
    def make(global_norm):
        return lambda grads, *others: global_norm([local(grad) for grad in grads], *others)

    return instead(grad_norm, "global_norm", make)


# ---- context parallelism ----


def positions_of_every_rank_from_zero():
    from nemo_dist_context.batch import SequenceSplitter

    def make(call):
        def local(self, batch):
            part = call(self, batch)
            return {**part, "position_ids": torch.arange(part["input_ids"].shape[1]).unsqueeze(0)}

        return local

    return instead(SequenceSplitter, "__call__", make)


def labels_shifted_after_the_split():
    from nemo_dist_context.batch import SequenceSplitter

    def make(call):
        def local(self, batch):
            whole = call(self, batch)
            unshifted = call(self, {**batch, "shift_labels": batch["labels"]})["shift_labels"]
            shifted = pad(unshifted, (0, 1), value=-100)[:, 1:].contiguous()
            return {**whole, "labels": shifted, "shift_labels": shifted}

        return local

    return instead(SequenceSplitter, "__call__", make)


def mask_of_the_wrong_queries():
    from nemo_dist_context.attention import SharedAttention

    def make(allowed):
        return lambda *given: allowed(*given).roll(1, dims=2)

    return instead(SharedAttention, "_allowed", make)


def key_gradients_of_other_ranks_lost():
    from nemo_dist_context import collectives

    def own(ctx, grad):
        return grad.chunk(ctx.group.size())[dist.get_rank(ctx.group)].contiguous(), None

    return patch.object(collectives._Gather, "backward", staticmethod(own))


# ---- what every topology does ----


def gradients_averaged_once_more():
    return instead(BatchLoop, "loss_scale", lambda scale: lambda self: scale(self) / dist.get_world_size())


def loss_averaged_over_ranks():
    def make(total):
        def own(self, count, given):
            total(self, count, given)
            return count.sum() * self._token_group.size()

        return own

    return instead(BatchLoop, "_total", make)


def replicas_not_synchronised():
    import nemo_dist_ddp.replicas

    return patch.object(nemo_dist_ddp.replicas, "replicate", lambda part, mesh, options: None)


def replicas_of_shards_not_synchronised():
    def make(all_reduce):
        return lambda *args, **options: None if in_backward() else all_reduce(*args, **options)

    return instead(dist, "all_reduce", make)


def one_parameter_not_updated():
    def make(step):
        def partly(self, closure=None):
            last = self.param_groups[-1]["params"][-1]
            stale = last.detach().clone()
            step(self, closure)
            if dist.get_rank() == 1:
                with torch.no_grad():
                    last.copy_(stale)

        return partly

    return instead(torch.optim.AdamW, "step", make)


def gradients_overwritten_by_the_next_batch():
    def make(no_sync):
        @contextmanager
        def forgetting(self):
            with no_sync(self):
                yield
            for part in self.sharded.parts:
                for parameter in part.parameters():
                    parameter.grad = None

        return forgetting

    return instead(BatchLoop, "no_sync", make)


def recomputed_from_another_input():
    def differing(norm, args):
        return (args[0] + 0.05, *args[1:]) if in_backward() else None

    def hook(model):
        for layer in blocks(model).values():
            layer.input_layernorm.register_forward_pre_hook(differing)

    return in_every_part(hook)


def wrong_rows_loaded_on_one_rank():
    @torch.no_grad()
    def flip(model):
        if dist.get_rank() == 1:
            rows = local(model.get_parameter("model.layers.1.self_attn.k_proj.weight"))
            rows.copy_(rows.flip(0))

    return in_every_part(flip)


def buffers_not_loaded():
    def zero(part):
        for name in {name for name, _ in part.named_buffers()} & part.state_dict().keys():
            part.get_buffer(name).zero_()

    return in_every_part(zero)


def optimizer_state_not_loaded():
    def make(load):
        return lambda sharded, path, optimizer=None, **others: load(sharded, path, None, **others)

    return instead(runtime, "load", make)


@contextmanager
def nothing_works():
    """Leave a sum out, export a weight of another shape, and fail where modules are recorded: all at once."""
    from nemo_dist.checkpoint import hf_export
    from nemo_dist.testing import proof_run

    def cut(model_state):
        return lambda sharded: {**model_state(sharded), "model.norm.weight": torch.ones(1)}

    def failing(_):
        def then(*_):
            raise RuntimeError("no hooks today")

        return then

    with row_output_not_summed(), instead(proof_run, "_tracing", failing), instead(hf_export, "model_state", cut):
        yield


def export_of_transposed_weights():
    def make(export):
        def wrong(sharded, path, dtype=None, max_shard_size="5GB"):
            with torch.no_grad():
                weight = dict(sharded.parts[0].named_parameters())["model.layers.0.self_attn.q_proj.weight"]
                local(weight).copy_(local(weight).flip(0))
            export(sharded, path, dtype, max_shard_size)

        return wrong

    return instead(runtime, "export", make)


# ---- pipeline parallelism ----


def tied_gradients_not_summed():
    from nemo_dist_pipeline.runtime.tied_embedding import TiedWeight

    return patch.object(TiedWeight, "sum_gradients", lambda self: None)


def layer_left_out():
    def skip(model):
        if model.pipeline_stage.is_last:
            first = next(name for name in model.pipeline_stage.modules if ".layers." in name)
            model.get_submodule(first).forward = lambda hidden_states, *args, **options: hidden_states

    return in_every_part(skip)


def norm_of_own_stage_only():
    def make(global_norm):
        return lambda grads, norm_type, axes, mesh: global_norm(grads, norm_type, (), mesh)

    return instead(grad_norm, "global_norm", make)


# ---- expert parallelism ----


def expert_gradients_divided_too_little():
    from nemo_dist_moe import experts

    def make(override):
        return lambda **options: override(**{**options, "grad_divisor": 1})

    return instead(experts, "ShardingOverride", make)


def router_loss_scaled_twice():
    return instead(RouterLoss, "settle", lambda settle: lambda self, scale: settle(self, 2 * scale))


def router_counts_padding():
    def make(count):
        return lambda self, logits, mask: count(self, logits, torch.ones_like(mask))

    return instead(RouterLoss, "_count", make)

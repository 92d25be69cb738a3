"""What a step of a specimen sends, counted where it is sent, beside what the plugins say of it."""

from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dist import DistributedSetup, initialize_distributed
from nemo_dist.plugin.comm_estimate import ModelFacts
from nemo_dist.testing.tiny_models import SPECIMENS

ROWS, LENGTH = 2, 16


class Sent(TorchDispatchMode):
    """Add up the bytes that this rank sends within the model, as if every exchange were even.

    ``sent`` has them by kind of collective; ``within`` those within layers, not of parameters and their gradients, by
    the name of the process group.
    """

    def __init__(self):
        super().__init__()
        self.sent = {"all-gather": 0, "reduce-scatter": 0, "all-to-all": 0, "all-reduce": 0}
        self.within = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = sum(self.sent.values())
        self._add(str(function), args)
        more = sum(self.sent.values()) - before
        if more and not str(function).startswith(("c10d._allgather_base_", "c10d._reduce_scatter_base_")):
            boxed = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg)]
            group = dist.ProcessGroup.unbox(boxed[0]).group_name if boxed else args[-1]
            self.within[group] += more
        return function(*args, **(kwargs or {}))

    def _add(self, name, args):
        if name.startswith("c10d._allgather_base_"):
            self.sent["all-gather"] += args[0].nbytes - args[1].nbytes
        elif name.startswith("c10d._reduce_scatter_base_"):
            self.sent["reduce-scatter"] += args[1].nbytes - args[0].nbytes
        elif name.startswith("_c10d_functional.all_gather_into_tensor"):
            self.sent["all-gather"] += args[0].nbytes * (args[1] - 1)
        elif name.startswith("_c10d_functional.reduce_scatter_tensor"):
            self.sent["reduce-scatter"] += args[0].nbytes * (args[2] - 1) // args[2]
        elif name.startswith("_c10d_functional.all_to_all_single"):
            ranks, to_one = len(args[2]), args[2].count(0) == len(args[2]) - 1
            self.sent["all-to-all"] += args[0].nbytes if to_one else args[0].nbytes * (ranks - 1) // ranks
        elif name.startswith("c10d.alltoall_base_"):
            ranks = dist.ProcessGroup.unbox(args[2]).size()
            self.sent["all-to-all"] += args[1].nbytes * (ranks - 1) // ranks
        elif name.startswith("_c10d_functional.all_reduce"):
            size = _resolve_process_group(args[2]).size()
            self.sent["all-reduce"] += 2 * args[0].nbytes * (size - 1) // size


class Reduced(Sent):
    """Add up the bytes of gradients that this rank sends in the all-reduce of a strategy."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function).startswith("c10d.allreduce_"):
            size = dist.ProcessGroup.unbox(args[1]).size()
            # Those of the runtime are of a few numbers: counts of labels, and the loss.
            self.bytes += sum(2 * one.nbytes * (size - 1) // size for one in args[0] if one.numel() > 4)
        return super().__torch_dispatch__(function, types, args, kwargs)


def on_rank_measure_bytes(specimen, options):
    """Return the bytes that a step sends by kind of collective, and those that the plugins say it will."""
    initialize_distributed("gloo")
    setup = DistributedSetup.build(**options)
    config = SPECIMENS[specimen].config()
    config.output_router_logits = False  # a router loss has collectives of its own
    with torch.device("meta"):
        whole = SPECIMENS[specimen].load.from_config(config)
    model = SPECIMENS[specimen].load.from_config(config, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    batch = SPECIMENS[specimen].batch(ROWS, LENGTH, torch.Generator().manual_seed(0))
    with Sent() as counter:
        runtime.forward_backward(batch)
    full = setup.recompute_mode == "full"
    facts = ModelFacts.of(whole, ROWS, LENGTH, setup.strategy.compute_dtype, full)
    said = dict.fromkeys(counter.sent, 0)
    for found in setup.calls.traffic(plan=setup.plan, facts=facts, model=whole):
        for entry in found:
            if entry.collective in said:
                said[entry.collective] += entry.sent
    return counter.sent, said

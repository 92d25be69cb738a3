"""Count the bytes that autograd and activation checkpointing keep for a backward, on this rank."""

import gc
import weakref
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch.utils import checkpoint

from nemo_dist.mesh.dtensor import local
from nemo_dist.torch_private import storage_id, tensors_in


def arguments(recompute):
    """Return the tensors that torch's function *recompute* calls a block with, beside those that it is given."""
    known = dict(zip(recompute.__code__.co_freevars, recompute.__closure__ or (), strict=True))
    bound = known["fn"].cell_contents
    return tensors_in((known["kwargs"].cell_contents, bound.keywords if isinstance(bound, partial) else ()))


class Box:
    """Holds a saved tensor as long as autograd holds the box."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()


class Saved:
    """Counts what is saved: ``most`` is the largest number of bytes at the begin of a backward, each storage once.

    Parameters and the batch do not count. What checkpointing keeps beside does, which no hook sees: the arguments of a
    block that is computed again, and the results that selective checkpointing caches.
    """

    def __init__(self, parts, batch):
        self.parts, self.batch = parts, batch
        self.boxes = weakref.WeakSet()
        self.most = 0

    def pack(self, tensor):
        if storage_id(local(tensor)) in {storage_id(local(one)) for one in self.held()}:
            return tensor
        box = Box(tensor)
        self.boxes.add(box)
        return box

    def note(self):
        gc.collect()
        kept = [box.tensor for box in self.boxes]
        for one in gc.get_objects():
            if isinstance(one, checkpoint._VersionWrapper):
                kept += tensors_in(one.val)
            elif isinstance(one, checkpoint._CheckpointFrame):
                kept += [*arguments(one.recompute_fn), *tensors_in(one.saved_args)]  # those in tuples, as of rope
        sizes = {storage_id(one): one.untyped_storage().nbytes() for one in map(local, kept)}
        for tensor in self.held():
            sizes.pop(storage_id(local(tensor)), None)
        self.most = max(self.most, sum(sizes.values()))

    def held(self):
        parameters = [parameter for part in self.parts for parameter in part.parameters()]
        # What a forward computes of a parameter, and puts in its place, is no parameter.
        return [*(one for one in parameters if isinstance(one, torch.nn.Parameter)), *self.batch.values()]

    @contextmanager
    def counting(self):
        """Count in the steps within the context."""
        backward = torch.autograd.backward

        def noted(*args, **kwargs):
            self.note()
            return backward(*args, **kwargs)

        def unpack(found):
            return found.tensor if isinstance(found, Box) else found

        with torch.autograd.graph.saved_tensors_hooks(self.pack, unpack), patch("torch.autograd.backward", noted):
            yield

"""Rehearse a run of any size in one process, as any of its ranks: what it would hold, read and write, and the time.

Here: ``imagined_world`` (torch's fake process group, and a store for it), ``phases`` (CPU time and memory of each
part), ``holdings`` (bytes of parameters, gradients and optimizer), ``checkpoint_plan`` (what saving and loading would
do), ``rehearsal`` (all of it, and its report) and ``trial`` (whether a setup takes a model). The real functions run, on
the meta device. Not here: what a plan says without torch, which is in ``nemo_dist.planning``.
"""

"""Give a sharded model its weights: read this rank's slices from files, or draw them as one process would.

Here: ``hf_weight_loader`` (transformers' reader, after the model was sharded), ``deferred_init`` and
``missing_weights`` (initial weights). Not here: the public loaders, which are in ``nemo_dist.models``, and checkpoints
of a run.
"""

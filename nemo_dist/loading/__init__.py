"""Fill a sharded model with weights: this rank's slices of a checkpoint, or the initial weights that one process draws.

Here: ``hf_weight_loader`` (transformers' reader, run after the model is sharded), ``weight_conversion`` and
``conversion_rules`` (which weights are converted before they are sliced), ``names_of_parts`` (what the names in a
checkpoint mean for a part of a model), ``deferred_init`` and ``missing_weights``
(initial weights as one process draws them), ``own_buffers`` (what a user's class computes when it is made),
``slice_init`` and ``counted_draws`` (initial weights by slices), ``formula_weights`` (run a model without its weights),
``same_source`` (do ranks load the same) and ``other_formats`` (what checkpoints of other programs are).
Not here: the public loaders, which are in ``nemo_dist.models``, and
checkpoints of a run.
"""

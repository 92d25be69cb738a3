"""What a training step does around the model: weigh losses, check batches, clip gradient norms, train adapters.

Here: ``runtime`` (the object for training loops), ``batch_loop`` (forward and backward of a step), ``step_loss`` (the
model's own loss or the user's), ``loss_sums`` (whether that adds up over rows), ``loss_parameters`` (that a loss
trains itself), ``whole_rows`` (outputs of whole rows), ``evaluation``, ``model_inputs`` (no cache, packed sequences),
``rehearsal`` (how a model's outputs depend on other tokens), ``neighbouring_rows`` (on other rows), ``counted_calls``
(on how often it ran), ``fixed_draws`` and ``kept_state`` (what makes such runs comparable), ``batch_entries`` (what
own code reads of a batch), ``made_up_rows`` (values of its kind), ``loss_weighting``, ``router_aux_loss``,
``batch_checks``, ``uneven_batches``, ``replica_check`` (are copies equal on all ranks), ``train_mode`` (refuses batch
statistics and LayerDrop), ``forward_code`` (what modules draw and write), ``grad_norm``, ``parameters`` (by name),
``sharded_optimizer``, ``optimizer_probe``, ``gradient_average`` (of what every rank has whole), ``unreduced``
(gradients that wait for a reduction), ``peft_adapters``, ``modules_in_place`` (PEFT's ``modules_to_save``),
``token_rows`` (its trainable tokens), ``dora_magnitudes``, ``adapter_files``, ``merged_adapters``, ``seed`` (random
generators of the ranks). Not here: how a strategy reduces gradients.
"""

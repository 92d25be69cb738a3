"""What a training step does beside the model: weigh losses, check batches, clip norms, train adapters.

Here: ``runtime`` (what a loop holds), ``loss_weighting``, ``router_aux_loss``, ``batch_checks``, ``grad_norm``,
``peft_adapters``. Not here: how gradients are reduced, which is the strategy's.
"""

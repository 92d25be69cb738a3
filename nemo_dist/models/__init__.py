"""The loaders that users call: ``NeMoAutoModelFor*``, in ``auto_model``; ``other_loops`` says what cannot train them.

Not here: how weights are read, which is in ``nemo_dist.loading``.
"""

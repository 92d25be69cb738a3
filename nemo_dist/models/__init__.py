"""The loaders that users call: ``NeMoAutoModelFor*``, in ``auto_model``; and ``meta_model``, a model without weights.

``other_loops`` says what cannot train a loaded model.

Not here: how weights are read, which is in ``nemo_dist.loading``.
"""

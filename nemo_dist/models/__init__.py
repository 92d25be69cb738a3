"""The loaders that users call: ``NeMoAutoModelFor*``, in ``auto_model``.

Not here: how weights are read, which is in ``nemo_dist.loading``.
"""

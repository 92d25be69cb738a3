"""The live side of a plan: process group, device mesh, and how ranks exchange small values and tensors.

Here: ``process_group`` and ``mesh_context``, ``store_consensus`` (small values through the store, which also works when
a rank has failed), ``whereabouts`` (which rank will not come to such an exchange), ``rank_group`` (exchanges between
the ranks that save and load together), and ``dtensor`` (local and global tensors). Not here: what is sharded how, which
plugins decide.
"""

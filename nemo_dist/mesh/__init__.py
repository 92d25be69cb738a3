"""Ranks that run: the process group, the live mesh of a plan, and what ranks tell each other.

Here: ``process_group`` and ``mesh_context``, ``store_consensus`` (small values, also when a rank has failed),
``rank_group`` (collectives of the ranks that save together), and ``dtensor``, the arithmetic of sharded tensors. Not
here: what is sharded how, which plugins decide.
"""

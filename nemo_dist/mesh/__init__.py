"""The live side of a plan: process group, device mesh, and how ranks exchange small values and tensors.

Here: ``launch_env`` (what the launcher says), ``rendezvous`` (find the other ranks), ``process_group`` and
``mesh_context``, ``live_groups`` (what equal setups share), ``store_consensus`` (small values through the store, which
also works when a rank has failed) and ``meeting`` (how ranks do that), ``rank_status``, ``lost_peer`` and
``whereabouts`` (who failed first, or will not come), ``rank_group`` (exchanges between the ranks that save and load
together), and ``dtensor`` (local and global tensors).
Not here: what is sharded how, which plugins decide.
"""

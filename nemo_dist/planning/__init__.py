"""Plan the mesh with whole numbers: sizes that the user asks for, the axes that they make, who is in which group.

Here: ``sizes``, ``views``, ``mesh_plan``, and the checks of values that everybody shares (``validation``). Not here:
torch, process groups, and which plugin claims an axis; a plan for 16,384 ranks is made on a laptop in milliseconds.
"""

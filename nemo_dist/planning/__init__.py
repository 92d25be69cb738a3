"""Plan the mesh with integers only: the requested sizes, the axes that they make, and which ranks form each group.

Here: ``sizes``, ``views``, ``mesh_plan``, what devices can do (``device_flops``), and the shared checks of values
(``validation``). Not here: torch, process groups, and which plugin claims an axis; planning 16,384 ranks takes
milliseconds on a laptop.
"""

"""Compose a setup: choose plugins for what was asked, judge them together, explain the result; planned without torch.

Here: ``setup`` (``DistributedSetup``), ``composition`` (the values that it is made of), ``selection``,
``build_arguments``, ``config_section`` (YAML), ``explain``. Not here: what a plugin does.
"""

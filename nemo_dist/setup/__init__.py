"""Build a setup: select plugins for what was asked, validate them together, explain the result; all without torch.

Here: ``setup`` (``DistributedSetup``), ``composition`` (the values of a setup), ``selection``, ``request``,
``build_arguments``, ``config_section``, ``yaml_section`` and ``file_names`` (configuration files), ``explain`` (as
text), ``explain_page`` (as a web page) with ``rank_memory``. Not here: what a plugin does.
"""

"""The contract of a plugin, and how plugins are found and called; no torch is imported here.

Here: ``hookspecs`` (every hook), ``protocol`` (what a plugin class declares), ``registry`` (what is installed),
``hook_caller``, and what the options of plugins are made of: ``options``, ``mixed_precision``, ``sharding_override``,
``comm_estimate``. Not here: any plugin, and any name of one.
"""

"""The contract of a plugin, and how plugins are found and called; no torch is imported here.

Here: ``hookspecs`` (every hook), ``protocol`` (what a plugin class declares), ``registry`` (what is installed),
``hook_caller``, ``parts`` (what a plugin may do with the parts of a model), and what plugins are made with:
``options``, ``mixed_precision``, ``forwards``, ``sharding_override``, ``comm_estimate``. Not here: any plugin, and any
name of one.
"""

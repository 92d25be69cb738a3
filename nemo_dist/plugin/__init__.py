"""The plugin contract, and how plugins are found and called; imports no torch.

Here: ``hookspecs`` (every hook), ``protocol`` (what a plugin class declares), ``registry`` (installed plugins),
``hook_caller``, ``parts`` (how a plugin may change the list of model parts), and what plugins are built with:
``options``, ``mixed_precision``, ``forwards``, ``resharding``, ``sharding_override``, ``comm_estimate``,
``memory_estimate``. Not here: any plugin, or the name of one.
"""

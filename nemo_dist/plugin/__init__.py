"""The plugin contract, and how plugins are found and called; imports no torch.

Here: ``hookspecs`` (every hook), ``protocol`` (what a plugin class declares), ``contract`` (its version), ``registry``
(installed plugins), ``hook_caller``; what is judged: ``declaration`` (what a plugin says of itself), ``results`` (what
its hooks return), ``parts`` (how it may change the list of model parts); and what plugins are built with:
``options``, ``mixed_precision``, ``forwards``, ``resharding``, ``sharding_override``, ``comm_estimate``,
``memory_estimate``, ``step_schedule``. Not here: any plugin, or the name of one.
"""

"""The command ``nemo-dist``.

Here: ``main``, and its commands in ``plan_commands``, ``plugin_commands`` and ``run_commands`` (``train`` runs a
recipe); ``setup_options`` and ``terminal`` (what they share), ``tables`` (their output), ``search`` (what the command
of that name prints), the demo: ``demo``, ``demo_config``, ``demo_dataset``; and for authors of plugins ``new_plugin``
and ``plugin_check``. Not here: anything that a program could not do with the public names.
"""

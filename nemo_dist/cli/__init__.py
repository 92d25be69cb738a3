"""The command ``nemo-dist``.

Here: ``main`` (the commands; ``train`` runs a recipe), ``setup_options`` (what they share), ``tables`` (their output),
``search`` (the command of that name), the demo: ``demo``, ``demo_config``, ``demo_dataset``; and for authors of plugins
``new_plugin`` and ``plugin_check``. Not here: anything that a program could not do with the public names.
"""

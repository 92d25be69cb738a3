"""The command ``nemo-dist``.

Here: ``main`` (the commands), ``setup_options`` (what they share), ``tables`` (their output),
``search`` (the command of that name), and the demo: ``demo``,
``demo_config``, ``demo_dataset``. Not here: anything that a program could not do with the public names.
"""

"""The command ``nemo-dist``.

Here: ``main`` (the commands), ``tables`` (what they print), and the demo: ``demo``, ``demo_config``, ``demo_dataset``.
Not here: anything that a program could not do through the public names.
"""

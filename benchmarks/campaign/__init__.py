"""The fault campaign: what can happen to a run and its files, many times each, and whether anything is lost.

Here: what is counted (``tally``), a tiny training run (``tiny_run``), processes that are forked from a warm one
(``forks``), and the faults: ``kills``, ``disks``, ``reads``, ``rivals`` (two runs in one folder), ``manifests``,
``headers`` (of a model's files), ``flips`` and ``flat`` (memory, objects, threads and descriptors over many saves).
"""

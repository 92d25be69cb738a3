"""Start ranks on this machine and say which failed first.

Here: ``launch`` (the parent), ``worker`` (a rank), ``failures`` (a failure of its own, or the result of a dead peer).
Not here: launching on several machines, which is torchrun's.
"""

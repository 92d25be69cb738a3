"""Start ranks on this machine and report which one failed first.

Here: ``launch`` (the parent process), ``worker`` (a rank), ``failures`` (describe how a process ended). Not here:
launching on several machines, which is torchrun's.
"""

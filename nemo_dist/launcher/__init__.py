"""Start ranks on this machine and report which one failed first.

Here: ``launch`` (the parent process), ``worker`` (a rank), ``failures`` (classify an error as a rank's own or as the
result of a dead peer). Not here: launching on several machines, which is torchrun's.
"""

"""A module that is a script: it prints and leaves."""

import sys

print("usage: planted [options]")
sys.exit(2)

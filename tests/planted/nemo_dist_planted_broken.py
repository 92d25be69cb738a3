"""A module that does not import."""

raise OSError("libfoo.so.3: cannot open shared object file")

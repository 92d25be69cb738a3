"""Cut a model into stages: what it is made of, how the layers are dealt, and how a stage is made of the whole."""

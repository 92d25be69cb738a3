"""A whole training job from one YAML file, made of the public names: what ``nemo-dist train`` runs.

Here: ``config`` (the sections of the file), ``documents`` (text, JSON lines, folders of ``datasets``), ``tokens``
(documents to rows of tokens and labels), ``row_stream`` (which rows each rank trains on in each step), ``model`` (load
or make it, with adapters), ``optimization`` (loss, optimizer and schedule), ``refusals`` (of rows, schedules and steps
that do not fit), ``job`` (the loop of one rank), ``reference_scores`` (of pairs), ``metrics``, ``throughput``,
``progress``, and ``dry_run``. Not here: anything that a program could not do with the public names.
"""

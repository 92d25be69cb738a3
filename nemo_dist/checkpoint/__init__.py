"""Save and load a run under any topology, and export Hugging Face folders.

Here: ``save``, ``load``, ``run_folder`` and ``preemption``, for a ``sharded_model``; the canonical state that save and
load share (``state_dict``, ``optimizer_state``, ``scheduler_state``); who has which part of a tensor and who writes it
(``layout``, ``holdings``, ``save_plan``, ``chunks``), and what planning that costs (``planning_cost``); what a save
refuses (``equal_copies``, ``changed_optimizer``); the files (``manifest``, ``stored_tensor``, ``safetensors_writer``,
``json_state``, ``rng_state``); how they are written (``atomic_dir``, ``folder_lock``, ``host_copy``, ``async_save``);
and exports (``hf_export``, ``offline_export``, ``hf_weight_conversion``, ``hf_side_files``). Not here: the training
loop, and how ranks are arranged.
"""

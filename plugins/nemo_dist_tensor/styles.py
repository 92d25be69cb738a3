"""List transformers' tensor-parallel styles that this plugin supports; no torch, so that `build` can check a plan.

====================================  ================================================================================
style                                 what is sharded, and what is communicated
====================================  ================================================================================
``colwise``                           output features of a linear layer; the output stays sharded
``colwise_gather_output`` (``_rep``)  the same; the output is gathered
``rowwise``                           input features of a linear layer with sharded input; the output is summed
``rowwise_split_input`` (``_rep``)    the same for a whole input
``embedding_rowwise``                 the vocabulary of an embedding; the output is summed
``embedding_colwise``                 the features of an embedding; the output is gathered
``replicated_with_grad_allreduce``    nothing; the ranks use it in different ways, so its gradients are summed
``moe_tp_experts``                    the experts' parameters, by rules of their own; the output is summed
``mla_kv_a_proj``                     nothing; the gradients of its last ``qk_rope_head_dim`` outputs are summed
``packed_colwise`` (``_rowwise``)     of experts' parameters that hold two projections: each half
``local_params``                      the module's own parameters, by rules of their own
``replicate``                         nothing
====================================  ================================================================================
"""

from __future__ import annotations

COLUMN = frozenset({"colwise", "colwise_gather_output", "colwise_rep"})
ROW = frozenset({"rowwise", "rowwise_split_input", "rowwise_rep"})
GATHERED = frozenset({"colwise_gather_output", "colwise_rep"})  # their output is whole
WHOLE_INPUT = frozenset({"rowwise_split_input", "rowwise_rep"})
SUMMED = frozenset({"replicated_with_grad_allreduce"})
EMBEDDING = frozenset({"embedding_rowwise", "embedding_colwise"})
PARAMETER = SUMMED | {"colwise", "rowwise", "packed_colwise", "packed_rowwise", "replicate"}  # of a bare parameter
STYLES = COLUMN | ROW | EMBEDDING | PARAMETER | SUMMED | {"moe_tp_experts", "mla_kv_a_proj", "local_params"}

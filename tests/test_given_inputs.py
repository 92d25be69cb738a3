"""A model that computes in half precision is given what it is given on one process: only activations are cast."""

import pytest
import torch
import transformers
from own_models import SIZES, OwnConfig, OwnModel

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, NeMoAutoModelForSequenceClassification
from nemo_dist.testing.tensors import rows_of_rank

LABELS = torch.tensor([1000.3, 1003.4, 998.9, 1001.7])
TOKENS = (torch.arange(48).view(4, 12) * 5) % 90 + 3


def additive_mask():
    """Return a causal mask to add to the scores, (4, 1, 12, 12), in which the first row has padding on its left."""
    counted = torch.ones(4, 12, dtype=torch.bool)
    counted[0, :4] = False
    seen = torch.ones(12, 12, dtype=torch.bool).tril()[None, None] & counted[:, None, None, :]
    labels = TOKENS.masked_fill(~counted, -100)
    mask = torch.zeros(4, 1, 12, 12).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"input_ids": TOKENS, "labels": labels, "attention_mask": mask}


def on_rank_regression(policy):
    setup = DistributedSetup.build(FSDP2Config(mp_policy=policy))
    config = transformers.LlamaConfig(**SIZES, num_labels=1, problem_type="regression")
    load = NeMoAutoModelForSequenceClassification.from_config
    model = load(config, distributed_setup=setup, dtype=torch.float32)
    given = []
    model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    embeddings = torch.randn(4, 12, SIZES["hidden_size"])
    model(inputs_embeds=embeddings, labels=LABELS, attention_mask=torch.ones(4, 12))
    return {name: (value.dtype, value) for name, value in given[0].items()}


@pytest.mark.parametrize("policy", [None, {"param_dtype": "bfloat16"}], ids=["default", "dict"])
def test_labels_and_masks_stay_as_they_are_and_embeddings_are_cast(ranks, policy):
    for given in ranks(2).run(on_rank_regression, policy):
        assert torch.equal(given["labels"][1], LABELS)
        assert given["attention_mask"][0] == torch.float32
        assert given["inputs_embeds"][0] == torch.bfloat16


def on_rank_mask():
    setup = DistributedSetup.build(FSDP2Config())
    torch.manual_seed(0)
    model = NeMoAutoModelForCausalLM.from_config(
        OwnConfig(**SIZES), distributed_setup=setup, dtype=torch.float32, attn_implementation="eager"
    )
    runtime = setup.runtime(model)
    return runtime.forward_backward(rows_of_rank(additive_mask(), runtime)).item()


def test_a_row_that_a_mask_of_its_own_hides_wholly_has_a_loss(ranks):
    """The least float32 is minus infinity in bfloat16, of which the softmax is not a number."""
    torch.manual_seed(0)
    model = OwnModel._from_config(OwnConfig(**SIZES), attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    expected = model(**additive_mask()).loss.item()

    assert ranks(2).run(on_rank_mask) == pytest.approx([expected] * 2, rel=1e-3)

"""A model that computes in half precision is given what it is given on one process: and computes on it likewise."""

import pytest
import torch
import transformers
from own_models import SIZES, OwnConfig, OwnModel
from transformers.modeling_outputs import BaseModelOutput

from nemo_dist import (
    DistributedSetup,
    FSDP2Config,
    NeMoAutoModel,
    NeMoAutoModelForCausalLM,
    NeMoAutoModelForSeq2SeqLM,
    NeMoAutoModelForSequenceClassification,
)
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


def in_half(model):
    """Return *model* with its parameters, not the frequencies of rope, in bfloat16."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


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
    model = in_half(OwnModel._from_config(OwnConfig(**SIZES), attn_implementation="eager"))
    expected = model(**additive_mask()).loss.item()

    assert ranks(2).run(on_rank_mask) == pytest.approx([expected] * 2, rel=1e-3)


class PicturedConfig(OwnConfig):
    """Of the model below."""

    model_type = "pictured_llama"


class Pictured(OwnModel):
    """Adds pictures to the embeddings, and notes the dtypes of what it is given."""

    config_class = PicturedConfig

    def forward(self, input_ids=None, pictures=None, inside=None, shift_mask=None, **kwargs):
        self.seen = [inside["edge_mask"].dtype, shift_mask.dtype, inside["count"].dtype]
        inside["written"] = 1
        embeddings = self.model.embed_tokens(input_ids) + sum(pictures) + inside["shift"]
        return super().forward(inputs_embeds=embeddings, **kwargs)


transformers.AutoConfig.register("pictured_llama", PicturedConfig)
transformers.AutoModelForCausalLM.register(PicturedConfig, Pictured)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def agent():
    config = transformers.DecisionTransformerConfig(
        state_dim=5, act_dim=3, hidden_size=32, n_layer=2, n_head=2, max_ep_len=16, resid_pdrop=0, embd_pdrop=0
    )
    given = {"states": drawn(2, 4, 5), "actions": drawn(2, 4, 3), "returns_to_go": drawn(2, 4, 1)}
    steps = {"timesteps": torch.arange(4).repeat(2, 1), "attention_mask": torch.ones(2, 4)}
    return NeMoAutoModel, transformers.AutoModel, config, given | steps, "action_preds"


def translator(kind):
    config = transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    given = {"encoder_outputs": kind(drawn(2, 6, 32)), "decoder_input_ids": TOKENS[:2]}
    return NeMoAutoModelForSeq2SeqLM, transformers.AutoModelForSeq2SeqLM, config, given, "logits"


def pictured():
    inside = {"shift": drawn(1, 32), "edge_mask": torch.ones(2), "count": torch.ones(2, dtype=torch.long)}
    given = {"pictures": [drawn(2, 12, 32)] * 2, "inside": inside, "shift_mask": torch.ones(2)}
    return (
        NeMoAutoModelForCausalLM,
        transformers.AutoModelForCausalLM,
        PicturedConfig(**SIZES),
        {"input_ids": TOKENS[:2], **given},
        "logits",
    )


FLOATS = {
    "states": agent,
    "a tuple": lambda: translator(lambda hidden: (hidden,)),
    "an output": lambda: translator(lambda hidden: BaseModelOutput(last_hidden_state=hidden)),
    "own containers": pictured,
}


def half(value):
    """Return *value* with its floats in bfloat16, as a user of one process casts them; masks left out."""
    if isinstance(value, torch.Tensor):
        return value.bfloat16() if value.is_floating_point() else value
    if isinstance(value, dict):
        return type(value)(**{name: one if "mask" in name else half(one) for name, one in value.items()})
    return type(value)(map(half, value))


def on_rank_floats():
    """Return the output for every case, the dtypes that the model saw, and what its caller still has."""
    found = {}
    for case, make in FLOATS.items():
        load, _, config, given, output = make()
        torch.manual_seed(0)
        setup = DistributedSetup.build("fsdp2")
        model = load.from_config(config, distributed_setup=setup, dtype=torch.float32).eval()
        found[case] = model(**given)[output].detach(), getattr(model, "seen", None), given
    return found


def test_floats_that_a_model_computes_on_are_cast_wherever_they_are(ranks):
    """Each ended in torch's "must have the same dtype"."""
    found, _ = ranks(2).run(on_rank_floats)

    for case, make in FLOATS.items():
        _, load, config, given, output = make()
        torch.manual_seed(0)
        model = in_half(load.from_config(config)).eval()
        assert torch.equal(found[case][0], model(**half(given))[output]), case
    _, seen, given = found["own containers"]
    assert seen == [torch.float32, torch.float32, torch.long]
    assert given["inside"]["shift"].dtype == torch.float32
    assert given["inside"]["written"] == 1

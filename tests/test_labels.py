"""What a model's loss is a mean over is known, or the model is refused."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from nemo_dist import DistributedSetup
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.loss_weighting import count_labels, judge_loss
from nemo_dist.training.router_aux_loss import _formula


def bare(kind):
    """Return a model of this class without anything in it: only its forward is looked at."""
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    model.__dict__["loss_type"] = "ForCausalLM"
    model.__dict__["config"] = SimpleNamespace(is_encoder_decoder=False)
    return model


def test_an_extra_loss_over_all_logits_is_refused():
    model = bare(transformers.BambaForCausalLM)
    model.z_loss_coefficient = 0.1
    with pytest.raises(ValueError, match=r"BambaForCausalLM makes a loss .*z_loss.*load it with z_loss_coefficient=0"):
        judge_loss(model, routers_known=False)
    model.z_loss_coefficient = 0.0
    judge_loss(model, routers_known=False)


def test_a_decoder_whose_loss_does_not_shift_its_labels_is_refused():
    sizes = {"d_model": 16, "decoder_ffn_dim": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "vocab_size": 32}
    model = transformers.BartForCausalLM(transformers.BartConfig(**sizes))
    with pytest.raises(ValueError, match="BartForCausalLM makes a loss of its own"):
        judge_loss(model, routers_known=False)


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Models whose forwards do not say by their names what their losses are, and labels that count, of rows of 6.
PROVEN = {
    "XLNetLMHeadModel": ({"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "dropout": 0.0}, 0),
    "BertForMaskedLM": (SMALL | QUIET, 0),
    "T5ForConditionalGeneration": (
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        0,
    ),
    "BartForConditionalGeneration": (
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "dropout": 0.0,
        },
        0,
    ),
    "CTRLLMHeadModel": ({"n_embd": 16, "dff": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, 1),
}


@pytest.mark.parametrize("name", PROVEN)
def test_a_loss_that_a_run_shows_to_be_a_mean_over_labels_is_counted(name):
    """The loss of two rows is that of each by itself, weighted by what is counted."""
    options, shifted = PROVEN[name]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(vocab_size=32, **options)).eval()
    judge_loss(model, routers_known=False)
    tokens = torch.randint(3, 30, (2, 6))
    labels = tokens.clone()
    labels[0, :3] = labels[1, 5:] = -100
    both, first, second = (
        model(input_ids=tokens[rows], labels=labels[rows]).loss for rows in (slice(None), slice(0, 1), slice(1, 2))
    )
    counts = [count_labels(model, {"labels": labels[rows : rows + 1]}) for rows in range(2)]

    assert counts == [3, 5 - shifted]
    torch.testing.assert_close(both, (first * counts[0] + second * counts[1]) / sum(counts))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BertModel", "BertModel has no loss of its own; give a loss of your own"),
        ("BertForQuestionAnswering", "has a loss of type 'ForQuestionAnswering', whose mean is not known"),
        ("BertForPreTraining", "has a loss of type .*, whose mean is not known"),
    ],
)
def test_a_loss_that_is_not_known_is_refused_with_a_way_out(name, message):
    model = getattr(transformers, name)(transformers.BertConfig(vocab_size=32, **SMALL))
    with pytest.raises(ValueError, match=rf"{message}.*setup.runtime\(model, loss=...\)"):
        judge_loss(model, routers_known=False)


def test_a_class_whose_name_says_no_type_of_loss_trains_with_transformers_default():
    """Where no type is known, transformers takes the next-token loss; the numbers are those of a loss by hand."""
    model, batch = SPECIMENS["gpt2"].make(), SPECIMENS["gpt2"].batch(4, 12, torch.Generator())
    judge_loss(model, routers_known=False)
    output = model(**batch)
    logits, labels = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(output.loss, total / count_labels(model, batch))


def test_a_setup_has_no_runtime_for_a_model_whose_loss_is_not_known(on_ranks):
    (message,) = on_ranks(1, on_rank_refusal)
    assert "makes a loss of its own (from teacher_loss) that is not known to be the mean over the labels" in message


def on_rank_refusal():
    setup = DistributedSetup.build()
    model = SPECIMENS["llama"].load.from_config(SPECIMENS["llama"].config(), distributed_setup=setup)
    setup.runtime(model)

    class Distilled(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            teacher_loss = out.logits.mean()
            return {**out, "loss": self.loss_function + teacher_loss}

    model.__class__ = Distilled
    with pytest.raises(ValueError, match="loss") as caught:
        setup.runtime(model)
    return str(caught.value)


def test_a_router_loss_that_is_not_handled_is_refused():
    with pytest.raises(ValueError, match="load_balancing_loss_func"):
        judge_loss(SPECIMENS["mixtral"].make(), routers_known=False)
    judge_loss(SPECIMENS["mixtral"].make(), routers_known=True)


@pytest.mark.parametrize("name", ["num_items_in_batch", "ignore_index"])
def test_a_batch_that_changes_the_mean_is_refused(name):
    with pytest.raises(ValueError, match=f"the batch has '{name}', which changes what the loss is a mean over"):
        count_labels(SPECIMENS["llama"].make(), {"labels": torch.ones(1, 4, dtype=torch.long), name: 7})


REFUSED = {
    "causal": (
        "BambaForCausalLM BartForCausalLM BigBirdPegasusForCausalLM BlenderbotForCausalLM BlenderbotSmallForCausalLM "
        "CpmAntForCausalLM Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM MBartForCausalLM "
        "MarianForCausalLM MusicgenForCausalLM MusicgenMelodyForCausalLM MvpForCausalLM PLBartForCausalLM "
        "PegasusForCausalLM ProphetNetForCausalLM TrOCRForCausalLM WhisperForCausalLM"
    ),
    "image_text_to_text": (
        "BlipForConditionalGeneration GraniteDoclingForConditionalGeneration Kosmos2ForConditionalGeneration "
        "Kosmos2_5ForConditionalGeneration PI0ForConditionalGeneration Pix2StructForConditionalGeneration "
        "UdopForConditionalGeneration"
    ),
    "sequence_classification": "",
    "token_classification": (
        "BioGptForTokenClassification BrosForTokenClassification MraForTokenClassification "
        "XLMRobertaXLForTokenClassification YosoForTokenClassification"
    ),
}
KINDS = {"causal": "CAUSAL_LM"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_every_model_of_transformers_with_a_loss_of_its_own_is_refused(kind):
    """The contract with transformers: a new family that adds a term, or averages by itself, turns up here."""
    mapping = getattr(modeling_auto, f"MODEL_FOR_{KINDS.get(kind, kind.upper())}_MAPPING_NAMES")
    names = {n for found in mapping.values() for n in (found if isinstance(found, list | tuple) else [found])}
    loss = {"causal": "ForCausalLM", "image_text_to_text": "ForConditionalGeneration"}
    refused = []
    for name in sorted(names):
        model = bare(getattr(transformers, name))
        model.__dict__["loss_type"] = loss.get(kind, f"For{kind.title().replace('_', '')}")
        try:
            judge_loss(model, routers_known=_formula(model) is not None)
        except ValueError:
            refused.append(name)

    others = {"XLMWithLMHeadModel", "XLNetLMHeadModel", "DiffusionGemmaForBlockDiffusion", "VisionEncoderDecoderModel"}
    assert sorted(set(refused) - others) == sorted(REFUSED[kind].split())  # the others have no type of loss

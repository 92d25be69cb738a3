"""Every Auto class of transformers has a loader, and models of all kinds of heads train."""

import attrs
import pytest
import torch
import transformers
from cases import cases, slow
from transformers.models.auto import modeling_auto

import nemo_dist
from nemo_dist import DistributedSetup, FSDP2Config, ParallelismSizes, PipelineConfig
from nemo_dist.losses import CrossEntropy
from nemo_dist.models import auto_model
from nemo_dist.testing.equivalence import Outcome, Task, differences, merged, train_with
from nemo_dist.testing.precision import FP32

ALIASES = {"NeMoAutoModelBiEncoder": "AutoModel", "NeMoAutoModelCrossEncoder": "AutoModelForSequenceClassification"}


def test_every_auto_class_of_transformers_has_a_loader():
    theirs = {name for name in vars(modeling_auto) if name.startswith("AutoModel") and hasattr(transformers, name)}
    ours = {name for name in nemo_dist.__all__ if name.startswith("NeMoAutoModel")}
    assert ours == {f"NeMo{name}" for name in theirs} | set(ALIASES)
    for name in ours:
        assert getattr(nemo_dist, name).auto is getattr(transformers, ALIASES.get(name, name.removeprefix("NeMo")))


def test_a_loader_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'NeMoAutoModelForNothing'"):
        _ = auto_model.NeMoAutoModelForNothing


QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


_BART_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def _bert():
    return transformers.BertConfig(**BERT, **QUIET)


def _t5():
    return transformers.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )


def _bart():
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _BART_SIDE.items()}
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return transformers.BartConfig(vocab_size=96, d_model=32, max_position_embeddings=32, **sides, **quiet)


def _vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.ViTConfig(**sizes, **QUIET, image_size=8, patch_size=4, num_labels=3)


def tokens(generator, rows=8):
    return torch.randint(4, 90, (rows, 12), generator=generator)


def labelled(generator):
    found = tokens(generator)
    shares = torch.linspace(0.1, 0.9, len(found))[:, None]
    return {
        "input_ids": found,
        "labels": torch.where(torch.rand(found.shape, generator=generator) < shares, found, -100),
    }


def pictures(generator):
    return {
        "pixel_values": torch.randn(8, 3, 8, 8, generator=generator),
        "labels": torch.randint(0, 3, (8,), generator=generator),
    }


def spans(generator):
    return {
        "input_ids": tokens(generator),
        "start_positions": torch.randint(0, 6, (8,), generator=generator),
        "weight": torch.linspace(0.2, 1.5, 8),
    }


def hidden(generator):
    return {"input_ids": tokens(generator), "weight": torch.linspace(0.2, 1.5, 8)}


def of_hidden(outputs, batch):
    return outputs.last_hidden_state.square().mean((1, 2)), batch["weight"]


def of_starts(outputs, batch):
    found = torch.nn.functional.cross_entropy(outputs.start_logits, batch["start_positions"], reduction="none")
    return found, batch["weight"]


# Head, config, batch, and a loss, None for the model's own.
HEADS = {
    "masked": ("ForMaskedLM", _bert, labelled, None),
    "masked, own": ("ForMaskedLM", _bert, labelled, CrossEntropy()),
    "seq2seq": ("ForSeq2SeqLM", _t5, labelled, None),
    "seq2seq, own": ("ForSeq2SeqLM", _t5, labelled, CrossEntropy()),
    "seq2seq of bart": ("ForSeq2SeqLM", _bart, labelled, None),
    "images": ("ForImageClassification", _vit, pictures, None),
    "images, own": ("ForImageClassification", _vit, pictures, CrossEntropy()),
    "questions": ("ForQuestionAnswering", _bert, spans, of_starts),
    "embeddings": ("", _bert, hidden, of_hidden),
}


def _fsdp2(**sizes):
    return {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(**sizes)}


SETUPS = {
    "fsdp2": lambda: _fsdp2(),
    "ddp": lambda: {"strategy": "ddp"},
    "tp": lambda: _fsdp2(tp_size=2),
    "cp": lambda: _fsdp2(cp_size=2),
    "pp": lambda: _fsdp2(pp_size=2) | {"pipeline_config": PipelineConfig()},
}
_TWO_SEQUENCES = "it has an encoder and a decoder, whose sequences differ; use cp_size=1"
_NO_STAGES = "it does not run as a pipeline, so use pp_size=1 (fsdp2 and tp split it, too)"
# What is refused at load, and words of it.
REFUSED = {(head, "cp"): _TWO_SEQUENCES for head in HEADS if head.startswith("seq2seq")}
REFUSED |= {(head, "pp"): _NO_STAGES for head in HEADS if head.startswith(("seq2seq", "images"))}
REFUSED |= {
    (head, "cp"): "its forward does not run on a part of a sequence" for head in ("images", "images, own", "questions")
}


class HeadTask(Task):
    """Training of a model with one of the heads."""

    def batches(self, step):
        generator = torch.Generator().manual_seed(10 + step)
        return [HEADS[self.specimen][2](generator)]


def reference(task, folder, dtype=torch.float32):
    head, _, _, loss = HEADS[task.specimen]
    model = getattr(transformers, f"AutoModel{head}").from_pretrained(folder, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), **task.optimizer)
    losses, norms, gradients = [], [], {}
    for step in range(task.steps):
        (batch,) = task.batches(step)
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        outputs = model(**{name: value for name, value in given.items() if name != "weight"})
        if loss is None:
            total = outputs.loss
        else:
            found, weights = loss(outputs, batch)
            total = (found * weights).sum() / weights.sum()
        total.backward()
        if step == 0:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return Outcome(losses=losses, norms=norms, gradients=gradients, parameters=parameters)


def new_model(head, folder):
    kind, config, _, _ = HEADS[head]
    torch.manual_seed(0)
    getattr(transformers, f"AutoModel{kind}").from_config(config(), dtype=torch.float32).save_pretrained(folder)


def on_rank_train(task, folder, name):
    setup = DistributedSetup.build(**SETUPS[name]())
    head, _, _, loss = HEADS[task.specimen]
    kind = getattr(nemo_dist, f"NeMoAutoModel{head}")
    model = kind.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    return train_with(task, setup.runtime(model, loss=loss))


FIRST = {("masked", "fsdp2"), ("embeddings", "ddp")}
CASES = [
    (head, name) if (head, name) in FIRST else slow(head, name)
    for head in HEADS
    for name in SETUPS
    if (head, name) not in REFUSED
]


@cases(("head", "name"), CASES)
def test_a_model_of_every_kind_of_head_trains_as_on_one_process(ranks, tmp_path, head, name):
    new_model(head, tmp_path)
    task = HeadTask(specimen=head)
    found, expected = merged(ranks(2).run(on_rank_train, task, tmp_path, name)), reference(task, tmp_path)
    kept = {name: value for name, value in found.gradients.items() if name in expected.gradients or value.any()}
    exact = reference(task, tmp_path, torch.float64)  # says which differences are those of rounding
    assert differences(attrs.evolve(found, gradients=kept), expected, other=exact) == []


def on_rank_refuse(folder, refused):
    said = []
    for head, name in refused:
        setup = DistributedSetup.build(**SETUPS[name]())
        with pytest.raises(ValueError) as caught:
            getattr(nemo_dist, f"NeMoAutoModel{HEADS[head][0]}").from_pretrained(
                folder / head, distributed_setup=setup, dtype=torch.float32
            )
        said.append(str(caught.value))
    return said


def test_heads_that_an_axis_cannot_split_are_refused_at_load(ranks, tmp_path):
    refused = [(head, name) for head, name in REFUSED if not head.endswith("own")]
    for head, _ in refused:
        new_model(head, tmp_path / head)
    for said in ranks(2).run(on_rank_refuse, tmp_path, refused):
        assert [message for pair, message in zip(refused, said, strict=True) if REFUSED[pair] not in message] == []

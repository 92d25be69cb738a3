"""What own code reads of a batch besides tokens and labels is tried as batches have it, and refused where wrong."""

import pytest
import torch
from own_models import SIZES, OwnConfig, OwnModel
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nemo_dist.training.batch_entries import BatchEntries
from nemo_dist.training.loss_weighting import _SHIFTS, _judged, judge_loss
from nemo_dist.training.made_up_rows import MadeUpRows
from nemo_dist.training.neighbouring_rows import depends_on_rows

TOKENS = torch.arange(48).view(4, 12) * 5 % 90 + 3
LABELLED = {"input_ids": TOKENS, "labels": TOKENS}


def judged(kind, apart=False, weighs=True):
    with torch.device("meta"):
        return BatchEntries(model=kind(OwnConfig(**SIZES)), apart=apart, weighs=weighs)


class Picking(OwnModel):
    """Takes no label into its loss that a mask leaves out."""

    def forward(self, input_ids=None, labels=None, loss_mask=None, attention_mask=None, **kwargs):
        if labels is not None and loss_mask is not None:
            labels = labels.masked_fill(self.left_out(loss_mask), -100)
        return super().forward(input_ids=input_ids, labels=labels, attention_mask=attention_mask, **kwargs)

    def left_out(self, mask):
        return mask == 0


class PickingBefore(Picking):
    """The same, where the mask is of the tokens that predict."""

    def left_out(self, mask):
        return nn.functional.pad(mask, (1, 0), value=1)[:, :-1] == 0


class PickingOthers(Picking):
    """The same, where the mask says what to leave out."""

    def left_out(self, mask):
        return mask == 1


@pytest.mark.parametrize("first", [{"input_ids": TOKENS}, LABELLED], ids=["a forward", "a step without the entry"])
def test_a_batch_without_labels_leaves_the_loss_to_be_judged(first):
    judge, mask = judged(Picking, apart=True), torch.ones_like(TOKENS)
    judge(first | ({"loss_mask": mask} if "labels" not in first else {}))
    for name in ("labels", "shift_labels"):
        with pytest.raises(ValueError, match=r"Picking reads 'loss_mask' of the batch.*not the mean over the labels"):
            judge({"input_ids": TOKENS, name: TOKENS, "loss_mask": mask})


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("kind", [Picking, PickingBefore, PickingOthers])
def test_a_mask_that_takes_labels_out_of_the_mean_is_refused(kind, dtype):
    with pytest.raises(ValueError, match=r"reads 'loss_mask' of the batch.*not the mean over the labels"):
        judged(kind)(LABELLED | {"loss_mask": torch.ones_like(TOKENS).to(dtype)})


class Unpadded(OwnModel):
    """Takes no label into its loss that is padding, whether it is -100 or not."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        if labels is not None and attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, -100)
        return super().forward(input_ids=input_ids, labels=labels, attention_mask=attention_mask, **kwargs)


class Cutting(OwnModel):
    """Cuts off the columns that are padding in every row."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        if attention_mask is not None:
            length = int(attention_mask.sum(1).max())
            input_ids, attention_mask = input_ids[:, :length], attention_mask[:, :length]
            labels = None if labels is None else labels[:, :length]
        return super().forward(input_ids=input_ids, labels=labels, attention_mask=attention_mask, **kwargs)


class CuttingTooMuch(Cutting):
    """Leaves out the last token, too, of batches that are not padded in every row."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.shape[1] > attention_mask.sum(1).max():
            attention_mask = attention_mask[:, : int(attention_mask.sum(1).max()) - 1]
            input_ids = input_ids[:, : attention_mask.shape[1]]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


def test_labels_that_the_attention_mask_takes_out_of_the_mean_are_refused():
    with pytest.raises(ValueError, match=r"Unpadded makes a loss of its own \(from its own code\)"):
        judge_loss(judged(Unpadded).model, routers_known=False)


def test_padding_that_no_row_needs_may_be_cut_off():
    judge_loss(judged(Cutting).model, routers_known=False)
    assert depends_on_rows(judged(Cutting).model) is None
    assert depends_on_rows(judged(CuttingTooMuch).model) == "its output"


class Remote(PreTrainedModel):
    """A model whose forward is all its own, as remote code is."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.loss_type = "ForCausalLM"
        self.post_init()

    def forward(self, input_ids=None, labels=None, inputs_embeds=None, pixel_values=None, weights=None, **kwargs):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds")
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden + self.mix(hidden).tanh()
        if pixel_values is not None:  # one image for each token 7
            hidden = hidden.masked_scatter((input_ids == 7)[..., None], pixel_values)
        logits = self.head(hidden)
        if labels is None:
            return CausalLMOutputWithPast(logits=logits)
        if weights is None:
            return CausalLMOutputWithPast(
                loss=self.loss_function(logits, labels, vocab_size=self.config.vocab_size), logits=logits
            )
        losses = cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
        kept = weights[:, 1:] * (labels[:, 1:] != -100)
        return CausalLMOutputWithPast(loss=(losses * kept).sum() / kept.sum(), logits=logits)


def test_a_forward_of_ones_own_trains_on_what_takes_the_place_of_tokens():
    embedded = {"inputs_embeds": torch.rand(4, 12, 32), "labels": TOKENS}
    judge, weights = judged(Remote, apart=True), torch.ones(4, 12)
    judge(embedded)
    judge(embedded | {"input_ids": None})
    with pytest.raises(ValueError, match="Remote reads 'inputs_embeds', 'weights' of the batch"):
        judge(embedded | {"weights": weights})


def test_what_does_not_fit_made_up_rows_hides_nothing_else():
    judge, images = judged(Remote, apart=True), {"pixel_values": torch.rand(4, 7)}
    judge(LABELLED | images)
    with pytest.raises(ValueError, match="Remote reads 'weights' of the batch"):
        judge(LABELLED | images | {"weights": torch.ones(4, 12)})


class Scaling(OwnModel):
    """Divides its hidden states by a number, and adds one of the numbers for each row, or for each class."""

    def forward(self, input_ids=None, labels=None, temperature=None, bias=None, none=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        hidden = hidden if temperature is None else hidden / temperature
        if bias is not None and len(bias) != 2:
            raise ValueError("bias has two numbers, for whole batches")
        hidden = hidden if bias is None else hidden * (bias[0] - bias[1])
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_single_numbers_and_entries_without_any_are_tried():
    judge = judged(Scaling, apart=True)
    judge(LABELLED | {"temperature": torch.tensor(2.0), "none": torch.ones(4, 0), "bias": torch.tensor([3.0, 1.0])})


def test_only_what_is_per_row_is_cut_into_rows():
    entries = {"bias": torch.ones(2), "one": torch.tensor(2.0), "none": torch.ones(4, 0), "shares": torch.ones(4)}
    made = MadeUpRows(entries, TOKENS.shape)
    inputs = made(TOKENS[:2])
    row = made.rows(inputs, slice(0, 1))

    assert {name: tuple(value.shape) for name, value in row.items()} == {
        "input_ids": (1, 12),
        "bias": (2,),
        "one": (),
        "none": (1, 0),
        "shares": (1,),
    }


def test_labels_of_rows_of_like_losses_are_told_to_be_shifted():
    model, labels = judged(OwnModel).model, torch.tensor([[-100, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, *[-100] * 4]])
    shifted = torch.tensor([5.0, 4.9985, 5.0035])  # the mean of 7 and 3; of 7 and 4 it is 5.00032

    assert _judged(model, shifted, labels)
    assert vars(model)[_SHIFTS]

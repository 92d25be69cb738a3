"""A loss of the user's own is a sum over rows and tokens, or is refused where these are apart."""

from types import SimpleNamespace

import pytest
import torch
from cases import cases
from loss_runs import setups
from torch.nn.functional import cross_entropy, normalize
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from nemo_dist import DistributedSetup
from nemo_dist.losses import DPO, CrossEntropy
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.tensors import rows_of_rank
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training.loss_sums import LossSums
from nemo_dist.training.step_loss import OwnLoss


def of_tokens(outputs, batch):
    labels = batch["shift_labels"]
    return cross_entropy(outputs.logits.mT, labels, reduction="none"), (labels >= 0).float()


def a_mean(outputs, batch):
    losses, weights = of_tokens(outputs, batch)
    return losses.sum() / weights.sum(), 1


def a_mean_and_a_count(outputs, batch):
    losses, weights = of_tokens(outputs, batch)
    return losses.sum() / weights.sum(), weights.sum()


def whitened(outputs, batch):
    losses, _ = of_tokens(outputs, batch)
    return losses.sum(1) * (batch["reward"] - batch["reward"].mean()), torch.ones(len(losses))


def against_other_rows(outputs, batch):
    found = normalize(outputs[0].mean(1), dim=-1)
    return cross_entropy(found @ found.T, torch.arange(len(found)), reduction="none"), torch.ones(len(found))


def of_tokens_alone(outputs, batch):
    return a_mean(outputs, batch)


of_tokens_alone.per_token = True
DO_NOT_ADD_UP = (a_mean, a_mean_and_a_count, whitened, against_other_rows)


def advantages(outputs, batch):
    return of_tokens(outputs, batch)[0].sum(1), batch["reward"]


def read_by_number(outputs, batch):
    return of_tokens(SimpleNamespace(logits=outputs[0]), batch)


def noisy(outputs, batch):
    losses, weights = of_tokens(outputs, batch)
    return losses + torch.rand_like(losses), weights


def written(outputs, batch):
    outputs.logits.div_(2)
    return of_tokens(outputs, batch)


def of_packed_rows(outputs, batch):
    ends = batch["cu_seq_lens_q"]
    losses, _ = of_tokens(outputs, batch)
    return torch.stack([one.mean() for one in losses[0].tensor_split(ends[1:-1])]), torch.ones(len(ends) - 1)


def of_routers(outputs, batch):
    losses, weights = of_tokens(outputs, batch)
    return losses + sum(outputs.router_logits).logsumexp(-1).view(losses.shape), weights


class Warming:
    calls = 0

    def __call__(self, outputs, batch):
        self.calls += 1
        losses, weights = of_tokens(outputs, batch)
        return losses * self.calls, weights


ADD_UP = (of_tokens, of_routers, advantages, CrossEntropy(z_loss=0.1), DPO(), read_by_number, noisy, written, Warming())


def batch_of(rows, length=6):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (rows, length), generator=generator)
    labels[0, :3] = -100
    logits = torch.randn((rows, length, 9), generator=generator, requires_grad=True)
    draws = torch.randn(rows, generator=generator)
    view = {"input_ids": labels.abs(), "shift_labels": labels, "reward": draws, "reference_scores": draws}
    routed = tuple(torch.randn((2, rows * length, 3), generator=generator))
    return MoeCausalLMOutputWithPast(logits=logits * 2, router_logits=routed), {
        f"loss.{name}": value for name, value in view.items()
    }


def called(loss, outputs, batch, dims=(0,)):
    return OwnLoss(function=loss, model=None, sums=LossSums(dims=dims))(outputs, batch)


@pytest.mark.parametrize("rows", [4, 3, 1])
@pytest.mark.parametrize("loss", DO_NOT_ADD_UP)
def test_what_is_no_sum_over_rows_is_refused(loss, rows):
    with pytest.raises(ValueError, match=rf"{loss.__qualname__} does not add up over rows.*set its attribute rows_tog"):
        called(loss, *batch_of(rows))


@pytest.mark.parametrize("rows", [4, 2])
@pytest.mark.parametrize("loss", ADD_UP, ids=lambda loss: getattr(loss, "__name__", type(loss).__name__))
def test_what_adds_up_is_the_sum_that_it_was(loss, rows):
    outputs, batch = batch_of(rows)
    found, count = called(loss, outputs, batch)
    if not isinstance(loss, Warming) and loss not in (noisy, written):
        wanted, weight = called(loss, outputs, batch, dims=())
        assert (found.item(), count.item()) == pytest.approx((wanted.item(), weight.item()))
    found.backward()  # nothing that the first call kept was written


def test_what_is_no_sum_over_tokens_is_refused():
    with pytest.raises(ValueError, match="a_mean does not add up over tokens"):
        called(a_mean, *batch_of(2), dims=(1,))
    for loss in (CrossEntropy(), of_routers):
        called(loss, *batch_of(2), dims=(1,))


def test_packed_rows_are_not_taken_apart():
    outputs, batch = batch_of(1)
    called(of_packed_rows, outputs, batch | {"loss.cu_seq_lens_q": torch.tensor([0, 2, 6])})


def on_rank_refuse(folder, options, loss):
    setup = DistributedSetup.build(**options)
    model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model, loss=loss)
    tokens = torch.arange(48).view(4, 12) * 5 % 60 + 3
    with pytest.raises(ValueError, match=r"does not add up over"):
        runtime.forward_backward(rows_of_rank({"input_ids": tokens, "labels": tokens}, runtime))


@cases(
    ("name", "loss"),
    [("fsdp2", a_mean), ("pp", a_mean), ("cp", of_tokens_alone)],
    lambda name, loss: f"{name}, {loss.__name__}",
)
def test_ranks_refuse_a_mean_in_the_first_step(ranks, name, loss):
    world, _, options = setups()[name]
    if name == "pp":
        with pytest.raises(Exception, match="a_mean does not add up over rows"):
            ranks(world).run(on_rank_step, checkpoint("llama"), options, loss)
    else:
        ranks(world).run(on_rank_refuse, checkpoint("llama"), options, loss)


def on_rank_step(folder, options, loss):
    setup = DistributedSetup.build(**options)
    model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    tokens = torch.arange(48).view(4, 12) * 5 % 60 + 3
    setup.runtime(model, loss=loss).forward_backward({"input_ids": tokens, "labels": tokens})

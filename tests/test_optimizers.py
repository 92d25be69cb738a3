"""Every optimizer of torch, and transformers' Adafactor, gives what it gives on one process, or is refused."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from cases import case_id, cases, slow
from torch.distributed.tensor import Replicate, Shard

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, ParallelismSizes
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tensors import rows_of_rank, whole
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training import optimizer_probe

LLAMA = SPECIMENS["llama"]
SETUPS = {
    "fsdp2": lambda: {"strategy": FSDP2Config(mp_policy=FP32)},
    "tp": lambda: {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(tp_size=2)},
    "pp": lambda: {"strategy": FSDP2Config(mp_policy=FP32), "parallelism_sizes": ParallelismSizes(pp_size=2)},
    "ddp": lambda: {"strategy": DDPConfig()},
}
ELEMENTWISE = {
    "Adadelta": {"lr": 1.0},
    "Adagrad": {"lr": 1e-2},
    "Adam": {"lr": 1e-2, "eps": 1e-5},
    "AdamW": {"lr": 1e-2, "eps": 1e-5, "foreach": False},
    "Adamax": {"lr": 1e-2, "eps": 1e-5},
    "ASGD": {"lr": 1e-2},
    "NAdam": {"lr": 1e-2, "eps": 1e-5},
    "RAdam": {"lr": 1e-2, "eps": 1e-5},
    "RMSprop": {"lr": 1e-3, "eps": 1e-4},
    "SGD": {"lr": 1e-1, "momentum": 0.9, "nesterov": True},
}
REFUSED = {
    "Adafactor": {},
    "LBFGS": {},
    "Muon": {},
    "Rprop": {},
    "SparseAdam": {},
    "transformers.Adafactor": {"scale_parameter": True},
}


def optimizer_class(name):
    package, _, last = name.rpartition(".")
    return getattr({"": torch.optim, "transformers": transformers.optimization}[package], last)


def batch(step):
    return LLAMA.batch(4, 12, torch.Generator().manual_seed(step))


def trainable(model_or_runtime, name):
    """Return the named parameters that the optimizer *name* takes: Muon takes matrices only."""
    named = dict(model_or_runtime.named_parameters())
    return {n: p for n, p in named.items() if name != "Muon" or p.ndim == 2}


def on_rank_three_steps(setup, name, options, folder):
    """Return the parameters after three steps, or the message of the refusal."""
    setup = DistributedSetup.build(**SETUPS[setup]())
    runtime = setup.runtime(LLAMA.load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32))
    try:
        optimizer = runtime.optimizer(optimizer_class(name), list(trainable(runtime, name).values()), **options)
    except ValueError as error:
        return str(error)
    for step in range(3):
        runtime.forward_backward(rows_of_rank(batch(step), runtime))
        optimizer.step()
        runtime.model.zero_grad() if name == "Muon" else optimizer.zero_grad()
    return {n: whole(p) for n, p in runtime.named_parameters()}


def alone(name, options, folder):
    model = LLAMA.load.from_pretrained(folder, dtype=torch.float32)
    optimizer = optimizer_class(name)(trainable(model, name).values(), **options)
    for step in range(3):
        model(**batch(step)).loss.backward()
        optimizer.step()
        model.zero_grad()
    return dict(model.named_parameters())


def test_every_optimizer_of_torch_is_in_a_table():
    kinds = {name for name, kind in vars(torch.optim).items() if inspect.isclass(kind)}
    kinds = {name for name in kinds if issubclass(getattr(torch.optim, name), torch.optim.Optimizer)}

    assert kinds - {"Optimizer"} == {name for name in ELEMENTWISE | REFUSED if "." not in name}


@cases(
    ("setup", "name"),
    [
        *(("fsdp2", name) for name in ("AdamW", "SGD")),
        *(slow("fsdp2", name) for name in ELEMENTWISE if name not in ("AdamW", "SGD")),
        *(slow(setup, name) for setup in ("tp", "pp", "ddp") for name in ELEMENTWISE),
        slow("ddp", "Adafactor"),
        slow("ddp", "Rprop"),
    ],
)
def test_three_steps_are_those_of_one_process(ranks, setup, name):
    options = {**ELEMENTWISE, **REFUSED}[name]
    expected = alone(name, options, checkpoint("llama"))

    for found in ranks(2).run(on_rank_three_steps, setup, name, options, checkpoint("llama")):
        assert not isinstance(found, str), found
        for parameter, value in found.items():
            assert (value - expected[parameter]).norm() <= 1e-5 * expected[parameter].norm(), parameter


@pytest.mark.parametrize("setup", ["fsdp2", pytest.param("tp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REFUSED)
def test_an_optimizer_that_mixes_elements_is_refused(ranks, setup, name):
    for message in ranks(2).run(on_rank_three_steps, setup, name, REFUSED[name], checkpoint("llama")):
        assert isinstance(message, str)
        last = name.rpartition(".")[2]
        assert message.startswith(f"{last} does not step parameters on several ranks as on one process: ")
        assert message.endswith("or a strategy that keeps the whole model on every rank")


RATES = (0.3, 0.03)


def in_groups(named):
    """Return the embedding, which only the first stage has, and all else."""
    first = [parameter for name, parameter in named if "embed_tokens" in name]
    return [{"params": first}, {"params": [one for _, one in named if not any(one is other for other in first)]}]


def on_rank_rates(specimen, sizes, folder):
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32), parallelism_sizes=ParallelismSizes(**sizes))
    model = SPECIMENS[specimen].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    runtime = setup.runtime(model)
    optimizer = runtime.optimizer(torch.optim.SGD, in_groups(list(runtime.named_parameters())), lr=1.0)
    for step in range(2):
        for place, group in enumerate(optimizer.param_groups):
            group["lr"] = RATES[group.get("group_index", place)]
        runtime.forward_backward(rows_of_rank(batch(step), runtime))
        optimizer.step()
        optimizer.zero_grad()
    return len(optimizer.param_groups), {n: whole(p) for n, p in runtime.named_parameters()}


@cases(
    ("specimen", "sizes", "groups"),
    [("llama", {"pp_size": 2}, 2), ("qwen3-moe", {"ep_size": 2}, 3)],
    lambda specimen, sizes, groups: case_id(specimen, sizes),
)
def test_rates_that_are_set_by_group_are_those_of_one_process(ranks, specimen, sizes, groups):
    model = SPECIMENS[specimen].load.from_pretrained(checkpoint(specimen), dtype=torch.float32)
    optimizer = torch.optim.SGD(in_groups(list(model.named_parameters())), lr=1.0)
    for group, rate in zip(optimizer.param_groups, RATES, strict=True):
        group["lr"] = rate
    for step in range(2):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = dict(model.named_parameters())

    for count, found in ranks(2).run(on_rank_rates, specimen, sizes, checkpoint(specimen)):
        assert count == groups
        for name, value in found.items():
            assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def on_rank_one_stage(folder):
    """Train the head alone, which only the last stage has; then nothing."""
    setup = DistributedSetup.build(**SETUPS["pp"]())
    runtime = setup.runtime(LLAMA.load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32))
    head = [parameter for name, parameter in runtime.named_parameters() if name == "lm_head.weight"]
    optimizer = runtime.optimizer(torch.optim.AdamW, head, lr=0.1)
    runtime.forward_backward(rows_of_rank(batch(0), runtime))
    optimizer.step()
    with pytest.raises(ValueError, match="got no parameters on any rank"):
        runtime.optimizer(torch.optim.AdamW, [])
    return {n: whole(p) for n, p in runtime.named_parameters()}


def test_a_stage_without_trained_parameters_has_an_optimizer_too(ranks):
    model = LLAMA.load.from_pretrained(checkpoint("llama"), dtype=torch.float32)
    model(**batch(0)).loss.backward()
    torch.optim.AdamW([model.lm_head.weight], lr=0.1).step()
    for found in ranks(2).run(on_rank_one_stage, checkpoint("llama")):
        torch.testing.assert_close(found, {name: model.get_parameter(name).detach() for name in found})


class NormalisedSGD(torch.optim.Optimizer):
    """Divide the gradient of a tensor by its norm: of a shard's local part, which is not the tensor's."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                own = getattr(parameter, "_local_tensor", parameter)
                grad = getattr(parameter.grad, "_local_tensor", parameter.grad)
                own.sub_(grad / grad.norm(), alpha=group["lr"])


class GlobalNormSGD(torch.optim.Optimizer):
    """Divide by the norm of the gradients of all its tensors, of which a pipeline stage has a part."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = sum(parameter.grad.square().sum() for parameter in params).sqrt()
        for parameter in params:
            parameter.sub_(parameter.grad / norm, alpha=self.param_groups[0]["lr"])


class LateNormalisedSGD(NormalisedSGD):
    """Divide so from the sixth step on, as optimizers do that begin with plain steps."""

    steps = 0

    def step(self):
        self.steps += 1
        return super().step() if self.steps > 5 else torch.optim.SGD.step(self)

    def __init__(self, params, lr=0.1):
        torch.optim.Optimizer.__init__(self, params, torch.optim.SGD([torch.zeros(1)], lr=lr).defaults)


OWN = {one.__name__: one for one in (NormalisedSGD, GlobalNormSGD, LateNormalisedSGD)}


def on_rank_own(setup, name, folder, lr=0.1):
    setup = DistributedSetup.build(**SETUPS[setup]())
    runtime = setup.runtime(LLAMA.load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32))
    try:
        runtime.optimizer(OWN[name], lr=lr)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("setup", "name", "said"),
    [
        ("fsdp2", "NormalisedSGD", "its update mixes the elements of different ranks"),
        ("fsdp2", "LateNormalisedSGD", "its update mixes the elements of different ranks"),
        ("pp", "GlobalNormSGD", "depends on others, which another pipeline stage may hold"),
        ("ddp", "NormalisedSGD", "accepted"),
        ("fsdp2", "GlobalNormSGD", "accepted"),  # a DTensor's sum is that of all shards
    ],
)
def test_an_optimizer_of_a_third_party_is_judged_by_what_it_does(ranks, setup, name, said):
    for message in ranks(2).run(on_rank_own, setup, name, checkpoint("llama")):
        assert said in message


@pytest.mark.parametrize("lr", [0.0, 1e-7])
def test_what_an_optimizer_mixes_shows_at_any_rate(ranks, lr):
    for message in ranks(2).run(on_rank_own, "fsdp2", "NormalisedSGD", checkpoint("llama"), lr):
        assert "its update mixes the elements of different ranks" in message


def averaging():
    """Return the optimizer that the page on optimizers shows."""
    page = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text()
    found = {"torch": torch}
    exec(page[page.index("class AveragingAdamW") : page.index("initialize_distributed(")], found)
    return found["AveragingAdamW"]


def average_alone(folder):
    model = LLAMA.load.from_pretrained(folder, dtype=torch.float32)
    optimizer = averaging()(model.parameters(), lr=1e-2, eps=1e-5)
    for step in range(3):
        model(**batch(step)).loss.backward()
        optimizer.step()
        model.zero_grad()
    optimizer.swap()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, model(**batch(9)).loss.item()


def on_rank_average(setup, folder, path, steps):
    """Return the averages and the loss with them after the *steps*; what *path* has was stepped before."""
    setup = DistributedSetup.build(**SETUPS[setup]())
    runtime = setup.runtime(LLAMA.load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32))
    optimizer = runtime.optimizer(averaging(), lr=1e-2, eps=1e-5)
    if path.exists():
        runtime.load(path, optimizer)
    for step in steps:
        runtime.forward_backward(rows_of_rank(batch(step), runtime))
        optimizer.step()
        optimizer.zero_grad()
    if not path.exists():
        runtime.save(path, optimizer)
    optimizer.swap()
    found = {name: whole(parameter) for name, parameter in runtime.named_parameters()}
    return found, runtime.evaluate([rows_of_rank(batch(9), runtime)]).item()


@cases(("first", "then"), [("fsdp2", "tp"), slow("ddp", "fsdp2"), slow("tp", "pp"), slow("pp", "ddp")])
def test_an_average_of_the_weights_is_that_of_one_process_and_resumes(ranks, first, then, tmp_path):
    folder = checkpoint("llama")
    ranks(2).run(on_rank_average, first, folder, tmp_path / "saved", [0, 1])
    expected, loss = average_alone(folder)
    for found, with_it in ranks(2).run(on_rank_average, then, folder, tmp_path / "saved", [2]):
        assert with_it == pytest.approx(loss, rel=1e-5)
        for name, value in found.items():
            assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def test_what_is_tried_out_grows_only_along_the_sharded_dims():
    """Two elements for each of 16,384 ranks along the dim that they share, and two along the others."""
    mesh = SimpleNamespace(size=lambda axis: (16384, 8)[axis])
    one, two = optimizer_probe._tensors(3, mesh, (Shard(1), Replicate()), torch.device("cpu"))
    assert one.shape == two.shape == (2, 32768, 2)
    (both, _) = optimizer_probe._tensors(2, mesh, (Shard(0), Shard(0)), torch.device("cpu"))
    assert both.shape == (2 * 16384 * 8, 2)

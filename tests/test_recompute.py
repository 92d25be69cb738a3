"""Activation checkpointing: the same gradients bit for bit, from fewer activations."""

import weakref

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, TopologyError, initialize_distributed
from nemo_dist.testing.equivalence import Task, assert_equivalent, checkpoint, trained
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist_recompute import RecomputeConfig
from nemo_dist_recompute.apply import recompute

STRATEGIES = {"fsdp2": FSDP2Config(mp_policy=FP32), "ddp": DDPConfig()}
MODES = (False, "selective", "full")


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors made while the mode is on that are still alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key, size):
        self._seen.discard(key)
        self.now -= size


def test_running_statistics_are_not_counted_twice():
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=(8, 8),
        conv_kernel=(3, 3),
        conv_stride=(2, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=8,
        layerdrop=0.0,
        mask_time_prob=0.0,
    )
    model = transformers.Wav2Vec2ConformerModel(config).train()
    recompute(model, RecomputeConfig())
    sound = torch.randn(2, 200)

    with pytest.raises(ValueError, match=r"running statistics of batches \(in .*BatchNorm1d\).*freeze them"):
        model(sound)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    model(sound).last_hidden_state.sum().backward()


def on_rank_measure(folder, mode, train, specimen="llama", scope=None):
    """Return what the forward leaves alive for the backward, the peak of both, and every gradient."""
    initialize_distributed("gloo")
    strategy = FSDP2Config(mp_policy=FP32, activation_checkpointing_scope=scope)
    setup = DistributedSetup.build(strategy=strategy, activation_checkpointing=mode)
    chosen = SPECIMENS[specimen]
    model = chosen.load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32).train(train)
    batch = chosen.batch(4, 64, torch.Generator().manual_seed(0))
    packed = []

    def pack(tensor):
        packed.append(tensor.untyped_storage())
        return tensor

    with LiveBytes() as live:
        before = live.now
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch).loss
        alive = live.now - before
        hooked = sum({storage._cdata: storage.nbytes() for storage in packed}.values())
        packed.clear()
        loss.backward()
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    return alive, hooked, live.peak, gradients


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_recomputation_keeps_fewer_activations_and_equal_gradients(on_ranks, train):
    found = {m: on_ranks(1, on_rank_measure, checkpoint("llama"), m, train)[0] for m in MODES}
    for mode, (alive, hooked, peak, _) in found.items():
        print(f"activation_checkpointing={mode}: {alive} bytes alive, {hooked} of them seen by hooks, peak {peak}")
    (none, _, none_peak, exact), (some, _, some_peak, selective), (least, _, least_peak, full) = found.values()
    assert none > some > least
    assert none_peak > some_peak > least_peak
    for name, gradient in exact.items():
        assert torch.equal(gradient, selective[name]), name
        assert torch.equal(gradient, full[name]), name


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_recomputation_matches_one_process(ranks, strategy, mode):
    options = {"strategy": STRATEGIES[strategy], "activation_checkpointing": mode}
    assert_equivalent(ranks(2), Task(specimen="llama"), **options)
    exact, recomputed = trained(ranks(2), Task(), strategy=STRATEGIES[strategy]), trained(ranks(2), Task(), **options)
    for name, gradient in exact.gradients.items():
        assert torch.equal(gradient, recomputed.gradients[name]), name


@pytest.mark.parametrize("specimen", ["llama-tied", "qwen3", "bert-sequences", "bert-tokens", "llava", "mixtral"])
def test_recomputation_fits_every_kind_of_model(ranks, specimen):
    assert_equivalent(
        ranks(2), Task(specimen=specimen), strategy=STRATEGIES["fsdp2"], activation_checkpointing="selective"
    )


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("specimen", ["mamba", "llama"])
def test_a_model_in_evaluation_mode_recomputes_without_its_cache(on_ranks, specimen, mode):
    exact, found = (on_ranks(1, on_rank_measure, checkpoint(specimen), m, False, specimen)[0][3] for m in (False, mode))
    assert exact.keys() == found.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_a_scope_recomputes_only_its_towers(on_ranks):
    folder = checkpoint("llava")
    alive = {
        scope: on_ranks(1, on_rank_measure, folder, True, True, "llava", scope)[0][0]
        for scope in ("language", "vision", ("language", "vision"), "all", "multimodal")
    }
    assert alive["language", "vision"] == alive["all"] < alive["language"] < alive["vision"]
    assert alive["multimodal"] == alive["vision"]


def on_rank_refusal(folder, **options):
    initialize_distributed("gloo")
    setup = DistributedSetup.build(**options)
    with pytest.raises(ValueError) as caught:
        SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup)
    return str(caught.value)


def test_a_scope_that_the_model_lacks_is_refused_at_load(on_ranks):
    strategy = FSDP2Config(activation_checkpointing_scope="language,vision")
    options = {"strategy": strategy, "activation_checkpointing": True}
    message = on_ranks(1, on_rank_refusal, checkpoint("llama"), **options)[0]
    assert "names 'vision', but LlamaForCausalLM has no such part; it has language" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_checkpointing": "bogus"}, "must be False, True, 'full' or 'selective' \\(got 'bogus'\\)"),
        (
            {"strategy": FSDP2Config(activation_checkpointing="selective"), "activation_checkpointing": True},
            "is 'full' on the setup but 'selective' on FSDP2Config; set it in one place",
        ),
        ({"strategy": DDPConfig(activation_checkpointing_scope="vision")}, "but nothing is recomputed"),
        (
            {"strategy": FSDP2Config(activation_checkpointing_scope="visoin"), "activation_checkpointing": True},
            "got 'visoin'\\); did you mean 'vision'",
        ),
        (
            {"strategy": FSDP2Config(activation_checkpointing_scope="all+vision"), "activation_checkpointing": True},
            "must be 'all' or some of",
        ),
        ({"plugins": (RecomputeConfig(mode="full"),), "activation_checkpointing": True}, "set it once"),
    ],
)
def test_contradictory_recompute_options_are_refused_at_build(options, message):
    with pytest.raises(ValueError, match=message):
        DistributedSetup.build(world_size=2, **options)


def test_the_mode_may_be_given_on_the_setup_the_strategy_or_a_plugin():
    for options in (
        {"strategy": FSDP2Config(activation_checkpointing=True)},
        {"plugins": (RecomputeConfig(mode="full"),)},
        {"activation_checkpointing": True},
    ):
        setup = DistributedSetup.build(world_size=2, **options)
        assert setup.recompute_mode == "full"
        assert [plugin.name for plugin in setup.plugins] == ["recompute", "fsdp2"]


def test_a_strategy_that_is_not_proven_with_a_mode_is_refused(monkeypatch):
    from nemo_dist_fsdp2 import FSDP2

    monkeypatch.setattr(FSDP2, "composes_with", frozenset({"activation_checkpointing"}))
    for options in ({"activation_checkpointing": "selective"}, {"plugins": (RecomputeConfig(mode="selective"),)}):
        with pytest.raises(TopologyError, match="'fsdp2' does not compose with it; use 'ddp'"):
            DistributedSetup.build(world_size=2, **options)


def on_rank_generate(folder):
    initialize_distributed("gloo")
    texts = []
    for mode in (False, True):
        setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32), activation_checkpointing=mode)
        model = SPECIMENS["llama"].load.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
        texts.append(model.generate(torch.tensor([[5, 7, 11]]), max_new_tokens=5, do_sample=False).tolist())
    return texts


def test_generation_still_uses_its_cache(on_ranks):
    plain, recomputed = on_ranks(1, on_rank_generate, checkpoint("llama"))[0]
    assert plain == recomputed


def test_what_a_layer_gets_by_name_is_known_to_torch_which_keeps_the_random_state_of_its_device():
    model = transformers.LlamaForCausalLM(SPECIMENS["llama"].config())
    recompute(model, RecomputeConfig(mode="full"))
    layer, seen = model.model.layers[0], []
    layer._gradient_checkpointing_func = lambda function, *args: seen.append(args) or function(*args)
    hidden = torch.randn(1, 4, model.config.hidden_size, requires_grad=True)
    positions = model.model.rotary_emb(hidden, torch.arange(4)[None])

    by_name = layer(hidden_states=hidden, position_embeddings=positions)
    assert torch.equal(by_name, layer(hidden, position_embeddings=positions))
    assert [args[0] is hidden for args in seen] == [True, True]

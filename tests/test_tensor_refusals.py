"""What tensor parallelism must refuse: at build what needs no model, at load the rest, with all reasons at once."""

from operator import attrgetter

import pytest
import torch
import transformers

from nemo_dist import (
    DDPConfig,
    DistributedSetup,
    FSDP2Config,
    NeMoAutoModelForCausalLM,
    ParallelismSizes,
    TopologyError,
)
from nemo_dist.testing.equivalence import Task, checkpoint
from nemo_dist.testing.shrink import tiny
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist_tensor import TensorConfig
from nemo_dist_tensor.random_choices import random_problems


def refused(error=TopologyError, tp_size=2, **options):
    with pytest.raises(error) as caught:
        DistributedSetup.build(world_size=4, parallelism_sizes=ParallelismSizes(tp_size=tp_size), **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("sequence_parallel", True), ("enable_async_tensor_parallel", True), ("tp_plan", {"lm_head": "replicate"})],
)
def test_tensor_parallel_options_with_tp_size_1_are_refused(option, value):
    message = refused(tp_size=1, strategy=FSDP2Config(**{option: value}))
    assert (
        message == f"- {option}={value!r} was given on the strategy, but tp_size is 1; set tp_size > 1 or leave it out"
    )


def test_async_tensor_parallelism_is_refused_with_every_reason():
    message = refused(strategy=FSDP2Config(enable_async_tensor_parallel=True))
    assert "overlaps the collectives of sequence parallelism, which is off" in message
    assert "symmetric memory of GPUs, which a CPU does not have" in message
    message = refused(strategy=FSDP2Config(enable_async_tensor_parallel=True, sequence_parallel=True))
    assert "which is off" not in message and "symmetric memory" in message


def test_an_unknown_style_suggests_the_near_one():
    message = refused(strategy=FSDP2Config(tp_plan={"lm_head": "colwize"}))
    assert "tp_plan gives 'lm_head' the style 'colwize'" in message and "did you mean 'colwise'?" in message


@pytest.mark.parametrize("plan", ["auto", {"lm_head": 1}, ["lm_head"]])
def test_a_plan_of_the_wrong_type_is_refused(plan):
    with pytest.raises(TypeError, match="tp_plan must be a dict from module names to styles"):
        FSDP2Config(tp_plan=plan)


@pytest.mark.parametrize("option", ["sequence_parallel", "tp_plan", "enable_async_tensor_parallel"])
def test_another_strategy_has_none_of_the_options(option):
    with pytest.raises(TypeError, match=f"DDPConfig has no option '{option}'"):
        DDPConfig(**{option: True})


def test_ddp_does_not_compose_with_tensor_parallelism():
    message = refused(strategy="ddp")
    assert "axis 'tp' has size 2, but strategy 'ddp' does not compose with it" in message and "'fsdp2'" in message


def test_options_on_the_strategy_beside_a_tensor_plugin_are_refused():
    message = refused(strategy=FSDP2Config(sequence_parallel=True), plugins=(TensorConfig(),))
    assert "sequence_parallel=True was given on the strategy, but plugin 'tensor' was given for axis 'tp'" in message


def test_options_on_the_strategy_reach_the_tensor_plugin():
    setup = DistributedSetup.build(
        FSDP2Config(sequence_parallel=True, tp_plan={"lm_head": "replicate"}), ParallelismSizes(tp_size=2), world_size=4
    )
    (tensor,) = [plugin for plugin in setup.plugins if "tp" in plugin.axes]
    assert tensor.config == TensorConfig(sequence_parallel=True, tp_plan={"lm_head": "replicate"})
    assert "reduce-scatter of their outputs" in setup.explain() and "1 rules of tp_plan" in setup.explain()


def on_rank_failure(config, tp_size, options):
    """Return what loading raises on this rank."""
    setup = DistributedSetup.build(FSDP2Config(**options), ParallelismSizes(tp_size=tp_size))
    loader = NeMoAutoModelForCausalLM if config.architectures is None else SPECIMENS[config.architectures[0]].load
    try:
        loader.from_config(config, distributed_setup=setup)
    except ValueError as error:
        return str(error)
    return "nothing"


def config_of(specimen, **changes):
    config = SPECIMENS[specimen].config()
    config.architectures = [specimen]
    for name, value in changes.items():
        setattr(config, name, value)
    return config


MLP = "layers.*.mlp."
REFUSED_AT_LOAD = {
    "heads": (config_of("llama-odd"), 4, {}, ["6 attention heads do not divide over 4", "tp_size of 2, 3, 6"]),
    "a rule for nothing": (
        config_of("llama"),
        2,
        {"tp_plan": {MLP + "up_prj": "colwise"}},
        [f"tp_plan has a rule for '{MLP}up_prj', which names no module", f"did you mean '{MLP}up_proj'?"],
    ),
    "a plan that is wrong": (
        config_of("phi3"),
        2,
        {"tp_plan": {MLP + "gate_up_proj": "colwise", MLP + "down_proj": "rowwise"}},
        ["the rules of model.layers.*.mlp", "do not compute what the whole module computes", "leave its rules out"],
    ),
    "a style that does not fit": (
        config_of("llama"),
        2,
        {"tp_plan": {"norm": "colwise"}},
        ["model.norm is a LlamaRMSNorm, which the style 'colwise' does not fit"],
    ),
    "a packed projection": (
        config_of("phi3"),
        2,
        {"tp_plan": {MLP + "gate_up_proj": "packed_colwise"}},
        ["fits experts' parameters only", "'colwise_gather_output'"],
    ),
    "packed experts": (
        config_of("mixtral", intermediate_size=57),
        2,
        {},
        ["two projections of 57 features", "2 tensor"],
    ),
    "tied weights": (
        config_of("llama-tied"),
        2,
        {"tp_plan": {"embed_tokens": "embedding_colwise"}},
        ["model.embed_tokens.weight and lm_head.weight are one tied parameter"],
    ),
    "untied by one rule": (config_of("llama-tied"), 2, {"tp_plan": {"lm_head": "replicate"}}, ["one tied parameter"]),
    "dropout": (
        config_of("llama", attention_dropout=0.1),
        2,
        {},
        ["model.layers.*.self_attn chooses at random in training", "set attention_dropout to 0 in the model's config"],
    ),
    "two reasons": (
        config_of("llama-odd", attention_dropout=0.1),
        4,
        {},
        ["6 attention heads", "set attention_dropout to 0"],
    ),
    "attention outside of the plan": (
        transformers.DeepseekV3Config(
            **{**SPECIMENS["deepseek"].config().to_dict(), "model_type": "deepseek_v3", "n_group": 1, "topk_group": 1}
        ),
        2,
        {"sequence_parallel": True},
        ["model.layers.*.self_attn.o_proj (Linear) is neither in the plan nor a norm", "sequence_parallel=False"],
    ),
    "a residual inside of a region": (
        config_of("roberta-decoder"),
        2,
        {"sequence_parallel": True},
        ["roberta.encoder.layer.*.output is given hidden states twice", "use sequence_parallel=False"],
    ),
}


@pytest.mark.parametrize("case", REFUSED_AT_LOAD)
def test_a_model_that_does_not_fit_is_refused_at_load_on_every_rank(ranks, case):
    config, tp_size, options, expected = REFUSED_AT_LOAD[case]

    for message in ranks(tp_size).run(on_rank_failure, config, tp_size, options):
        assert [part for part in expected if part not in message] == [], message


def tiny_on_meta(family, **options):
    config = tiny(family).config
    for name, value in options.items():
        *parts, last = name.split("__")
        setattr(attrgetter(".".join(parts))(config) if parts else config, last, value)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("family", "options", "where", "way_out"),
    [
        ("xglm", {"activation_dropout": 0.1}, "model", "set activation_dropout to 0 in the model's config"),
        ("opt", {"layerdrop": 0.01}, "model.decoder", "set layerdrop to 0 in the model's config"),
        (
            "seed_oss",
            {"attention_dropout": 0.1, "residual_dropout": 1e-3},
            "model.layers.*.self_attn",
            "set attention_dropout, residual_dropout to 0 in the model's config",
        ),
        (
            "dbrx",
            {"ffn_config__moe_jitter_eps": 0.01},
            "transformer.blocks.*.ffn.router",
            "set ffn_config.moe_jitter_eps to 0 in the model's config",
        ),
        ("phimoe", {}, "model.layers.*.mlp.router", "use tp_size=1, and fsdp2"),  # samples whatever its options are
        ("cpmant", {"dropout_p": 0.1}, "cpmant.", "set it to 0 in the model's config"),
    ],
)
def test_whatever_is_chosen_at_random_is_refused_with_a_way_out(family, options, where, way_out):
    """The last one takes no small tokens alone, and is told by the names of its attributes."""
    problem = random_problems(tiny_on_meta(family, **options))[0]

    assert problem.startswith(where) and "tensor-parallel ranks would choose differently" in problem
    assert problem.endswith(way_out)


def test_an_option_that_only_the_code_knows_is_told_too():
    with torch.device("meta"):
        model = transformers.AutoModelForTokenClassification.from_config(tiny("llama").config)

    assert random_problems(model)[0].endswith("set classifier_dropout to 0 in the model's config")


@pytest.mark.parametrize("family", ["opt", "big_bird"])
def test_what_is_drawn_and_makes_no_difference_is_not_refused(family):
    """OPT draws for layers that it leaves out with probability 0, BigBird for modules that it makes in its forward."""
    assert random_problems(tiny_on_meta(family)) == []


def on_rank_forward(folder, options):
    setup = DistributedSetup.build("fsdp2", ParallelismSizes(tp_size=2))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    try:
        model(input_ids=torch.ones(1, 4, dtype=torch.long), **options)
    except (ValueError, IndexError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_outputs_that_would_be_sharded_are_refused(ranks, option):
    for message in ranks(2).run(on_rank_forward, checkpoint("llama"), {option: True}):
        assert f"{option} is not available with tp_size=2" in message


def test_a_label_outside_the_vocabulary_is_refused(ranks):
    for message in ranks(2).run(on_rank_forward, checkpoint("llama"), {"labels": torch.full((1, 4), 96)}):
        assert "label 96 is no token of a vocabulary of 96" in message


def on_rank_step(folder, batches):
    setup = DistributedSetup.build("fsdp2", ParallelismSizes(tp_size=2))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    runtime = setup.runtime(model)
    try:
        runtime.forward_backward(batches[torch.distributed.get_rank()])
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_tensor_parallel_ranks_with_different_batches_are_refused(ranks):
    one, other = (Task(rows=2).batches(index)[0] for index in (0, 1))

    messages = ranks(4).run(on_rank_step, checkpoint("llama"), [one, one, other, one])
    for message in messages:
        assert message.startswith("RankError") and "num_replicas=runtime.dp_size" in message
        assert "data-parallel rank 1: the batch of rank 3 is not that of rank 2" in message
        assert "data-parallel rank 0" not in message
    assert ranks(4).run(on_rank_step, checkpoint("llama"), [one, one, other, other]) == ["nothing"] * 4


def test_a_batch_of_another_shape_or_one_more_batch_is_refused(ranks):
    (one,) = Task(rows=2).batches(0)
    short = {name: value[:, :5] for name, value in one.items()}
    for batches in ([one, short], [[one], [one, one]], [one, {**one, "position_ids": torch.arange(12).unsqueeze(0)}]):
        assert all(
            "the batch of rank 1 is not that of rank 0" in text
            for text in ranks(2).run(on_rank_step, checkpoint("llama"), batches)
        )


def test_only_the_first_batch_is_checked(ranks):
    assert ranks(2).run(on_rank_count_gathers) == [1, 1]


def on_rank_count_gathers():
    from nemo_dist.mesh.mesh_context import MeshContext
    from nemo_dist.training.batch_checks import BatchCheck

    gathered = []
    original = torch.distributed.all_gather
    torch.distributed.all_gather = lambda *args, **kwargs: gathered.append(1) or original(*args, **kwargs)
    try:
        setup = DistributedSetup.build("fsdp2", ParallelismSizes(tp_size=2))
        check, batch = BatchCheck(), {"labels": torch.ones(2, 3)}
        for _ in range(3):
            check.once([batch], setup.mesh_context)
        BatchCheck().once([batch], MeshContext())
    finally:
        torch.distributed.all_gather = original
    return len(gathered)

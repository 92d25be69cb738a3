"""What a CUDA device needs, tested without one: fake tensors and meshes, and the meta device in the place of a card."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.nn.attention import varlen  # noqa: F401, it defines an operator
from torch.nn.attention.bias import CausalBias
from torch.nn.functional import scaled_dot_product_attention
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint as checkpoint_layer

from nemo_dist import (
    DistributedSetup,
    FSDP2Config,
    NeMoAutoModelForCausalLM,
    NeMoAutoModelForSequenceClassification,
    ParallelismSizes,
    initialize_distributed,
)
from nemo_dist.checkpoint import host_copy, rng_state
from nemo_dist.checkpoint.host_copy import to_host
from nemo_dist.errors import CheckpointError, RankError
from nemo_dist.hf_model import INITIALIZED
from nemo_dist.loading.missing_weights import Draws
from nemo_dist.mesh.dtensor import filled, from_local
from nemo_dist.mesh.mesh_context import MeshContext
from nemo_dist.plugin.resharding import reshard
from nemo_dist.testing.equivalence import Task, checkpoint
from nemo_dist.testing.precision import FP32
from nemo_dist.testing.temp_folders import scratch
from nemo_dist.testing.tensors import rows_of_rank, saved_weights, whole
from nemo_dist.testing.tiny_models import SPECIMENS
from nemo_dist.training import replica_check
from nemo_dist.training.peft_adapters import adapters
from nemo_dist_context import packed, ring
from nemo_dist_context.attention import _lower_right
from nemo_dist_context.sequence_layout import SequenceLayout, index_of
from nemo_dist_fsdp2 import sharding
from nemo_dist_recompute.policy import is_attention, selective_contexts
from nemo_dist_tensor.layers import vocabulary

ROOT = Path(__file__).parents[1]


def on_rank_hold_a_shard_elsewhere():
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = DeviceMesh("cuda", torch.arange(2))
    shard = from_local(torch.ones(2, 3), mesh, [Shard(0)], like=torch.empty(4, 3, device="meta"))
    value = torch.arange(12.0).view(4, 3)
    refilled = filled(torch.nn.Parameter(shard), value, torch.device("cpu"))
    dist.destroy_process_group()
    return str(shard.device), tuple(shard.shape), str(refilled.device), refilled.to_local().detach()


def test_a_shard_on_the_cpu_stays_there_on_a_mesh_of_cards():
    code = (
        "import sys; sys.path[:0] = ['tests']; import test_devices as t; d = t.on_rank_hold_a_shard_elsewhere(); "
        "assert d[:3] == ('cpu', (4, 3), 'cpu'), d; assert d[3].tolist() == [[0, 1, 2], [3, 4, 5]], d"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def on_rank_offload(make, folder):
    setup = DistributedSetup.build(strategy=FSDP2Config(offload_policy="cpu"))
    shard = DistributedSetup.shard

    def on_cpu(self, model):
        with mock.patch.object(MeshContext, "device", torch.device("cpu")):  # FSDP2 has no handle for meta
            return shard(self, model)

    on_card = mock.patch.object(MeshContext, "device", torch.device("meta"))  # in the place of a card
    with on_card, mock.patch.object(DistributedSetup, "shard", on_cpu):
        if make == "from_pretrained":
            model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
        else:
            model = NeMoAutoModelForCausalLM.from_config(SPECIMENS["llama"].config(), distributed_setup=setup)
    parameters = {parameter.to_local().device.type for parameter in model.parameters()}
    return parameters, {buffer.device.type for buffer in model.buffers()}


@pytest.mark.parametrize("make", ["from_pretrained", "from_config"])
def test_offloaded_parameters_load_to_the_cpu_and_buffers_to_the_device(ranks, make):
    assert ranks(2).run(on_rank_offload, make, checkpoint("llama")) == [({"cpu"}, {"meta"})] * 2


def on_rank_note_what_waits(folder, offload):
    setup = DistributedSetup.build(strategy=FSDP2Config(offload_policy=offload))
    with mock.patch.object(sharding, "wait_for_copies") as wait:
        NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    return wait.call_count


def test_what_writes_to_offloaded_shards_waits_for_the_copies_of_forwards(ranks):
    folder = checkpoint("llama")
    assert [ranks(1).run(on_rank_note_what_waits, folder, offload) for offload in (None, "cpu")] == [[0], [1]]
    model, card = torch.nn.Linear(2, 2), torch.device("cuda", 0)
    with mock.patch.object(torch.cuda, "synchronize") as wait:
        sharding.wait_for_copies(model, card)
        model(torch.ones(2))
        assert wait.mock_calls == [mock.call(card)]  # for the forward before, which may have had no backward
        with torch.no_grad():
            model(torch.ones(2))
        assert wait.call_count == 3  # and for this one
        reshard([model])  # as a step, a load and runtime.named_parameters() do
    assert wait.call_count == 4


def on_rank_offload_without_gloo(folder):
    setup = DistributedSetup.build(strategy=FSDP2Config(offload_policy="cpu"))
    with (
        mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl"),
        pytest.raises(ValueError, match=r"no backend there \(only cuda:nccl\); initialise it with"),
    ):
        NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)


def test_offload_without_a_backend_for_the_cpu_is_refused_at_load(ranks):
    ranks(1).run(on_rank_offload_without_gloo, checkpoint("llama"))


def test_a_weight_that_a_checkpoint_lacks_is_recorded_and_not_drawn_where_it_is():
    part = torch.nn.ModuleDict({"loaded": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    for parameter in part["loaded"].parameters():
        setattr(parameter, INITIALIZED, True)
    seen = {}

    def initialise():
        seen.update({name: parameter.device.type for name, parameter in part.named_parameters()})
        torch.nn.init.normal_(part["head"].weight)
        torch.nn.init.zeros_(part["head"].bias)

    torch.manual_seed(3)
    expected = torch.empty(2, 2).normal_()
    torch.manual_seed(3)
    Draws(None).draw(part, initialise)

    assert seen == {"loaded.weight": "cpu", "loaded.bias": "cpu", "head.weight": "meta", "head.bias": "meta"}
    assert torch.equal(part["head"].weight, expected)
    assert not part["head"].bias.any()


def on_rank_default_device(new_head, folder):
    setup = DistributedSetup.build(strategy="ddp")
    torch.manual_seed(5)
    with torch.device("meta"):  # in the place of torch.set_default_device("cuda")
        if new_head:
            loader = NeMoAutoModelForSequenceClassification
            model = loader.from_pretrained(folder, distributed_setup=setup)
        else:
            model = NeMoAutoModelForCausalLM.from_config(SPECIMENS["llama"].config(), distributed_setup=setup)
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("new_head", [False, True])
def test_a_default_device_of_the_user_does_not_draw_the_weights(ranks, new_head):
    torch.manual_seed(5)
    expected = (
        NeMoAutoModelForSequenceClassification.from_pretrained(checkpoint("llama"))
        if new_head
        else NeMoAutoModelForCausalLM.from_config(SPECIMENS["llama"].config())
    )
    (found,) = ranks(1).run(on_rank_default_device, new_head, checkpoint("llama"))
    assert [n for n, p in expected.named_parameters() if not torch.equal(found[n].float(), p.float())] == []


def on_rank_save_under_a_default_device(folder, target):
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    elsewhere = torch.device("meta")  # in the place of torch.set_default_device("cuda")
    with elsewhere:
        runtime = setup.runtime(model)
        optimizer = runtime.optimizer(torch.optim.AdamW, lr=1e-3)
    runtime.forward_backward(rows_of_rank(Task().batches(0)[0], runtime))
    optimizer.step()
    before = {name: whole(parameter) for name, parameter in model.named_parameters()}
    with elsewhere:
        runtime.save(target / "saved", optimizer, asynchronous=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with elsewhere:
        runtime.load(target / "saved", optimizer)
        runtime.export(target / "exported")
    after = {name: whole(parameter) for name, parameter in model.named_parameters()}
    exported = saved_weights(target / "exported")
    return [n for n in before if not torch.equal(after[n], before[n]) or not torch.equal(exported[n], before[n])]


def test_a_default_device_of_the_user_takes_part_in_no_save_and_no_load(ranks):
    arguments = checkpoint("llama"), scratch("default_device")
    assert ranks(2).run(on_rank_save_under_a_default_device, *arguments) == [[], []]


def test_a_token_outside_of_the_vocabulary_is_asserted_on_the_device():
    asserted = []
    embedding = torch.nn.Embedding(8, 4, device="meta")
    peers = SimpleNamespace(bounds=lambda total: (0, total), all_reduce=lambda value: value, rank=0, size=1)
    vocabulary(embedding, peers)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(torch, "_assert_async", lambda *a: asserted.append(a)),
    ):
        embedding(torch.empty(3, dtype=torch.long, device="meta"))
    ((condition, message),) = asserted
    assert condition.shape == () and "outside of the vocabulary of 8" in message


def test_an_index_of_a_layout_is_made_once_and_serves_a_backward_after_inference():
    layout = SequenceLayout(size=2, rank=1, balanced=True)
    with torch.inference_mode():
        index = index_of(layout, "restoring", 24, torch.device("cpu"))
    assert index_of(layout, "restoring", 24, torch.device("cpu")) is index
    assert index.tolist() == layout.restoring(24)
    value = torch.ones(24, requires_grad=True)
    value.index_select(0, index).sum().backward()


def causal_attention(query, key, value, device):
    bias = _lower_right(query.shape[2], key.shape[2], torch.device(device))
    return type(bias), scaled_dot_product_attention(query, key, value, bias, enable_gqa=True)


def test_a_causal_mask_on_a_card_is_never_made_of_numbers_not_even_under_selective_recomputation():
    shapes = ((1, 4, 6, 8), (1, 2, 12, 8), (1, 2, 12, 8))
    given = [torch.randn(shape, requires_grad=True) for shape in shapes]
    kind, wanted = causal_attention(*given, "cpu")
    gradients = torch.autograd.grad(wanted.sin().sum(), given)
    kinds = []

    def layer(*inputs):
        kind, output = causal_attention(*inputs, "cuda")
        kinds.append(kind)
        return output

    found = checkpoint_layer(layer, *given, use_reentrant=False, context_fn=selective_contexts)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), given), gradients)
    assert kind is torch.Tensor and set(kinds) == {CausalBias}


@pytest.mark.parametrize(
    ("width", "dtype", "capability", "fits"),
    [
        (64, torch.bfloat16, (9, 0), True),
        (100, torch.bfloat16, (9, 0), False),  # torch pads no width for these kernels, and stops at 100
        (264, torch.bfloat16, (9, 0), False),
        (64, torch.float32, (9, 0), False),
        (64, torch.float16, (7, 5), False),  # a T4
    ],
)
def test_flash_attention_gets_no_inputs_at_which_it_stops(width, dtype, capability, fits):
    with FakeTensorMode(), mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
        query = torch.empty(1, 2, 4, width, dtype=dtype, device="cuda")
        assert ring.fits(query, query, dropout=0.0) is fits
        assert (packed.has_kernel(query.device, dtype) and packed.fits(query, query, {})) is fits


@torch.library.custom_op("flash_attn_of_a_package::varlen_fwd", mutates_args=())
def attention_of_a_package(query: torch.Tensor) -> torch.Tensor:
    return query.clone()


@pytest.mark.parametrize(
    "operator",
    [
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._efficient_attention_forward.default,  # of a causal bias
        torch.ops.aten._flash_attention_forward.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.higher_order.flex_attention,
        torch.ops.flash_attn_of_a_package.varlen_fwd.default,
    ],
    ids=str,
)
def test_selective_recomputation_keeps_every_fused_attention(operator):
    assert is_attention(operator)
    assert not is_attention(torch.ops.aten.mm.default)


def on_rank_make_a_mesh_of_many():
    setup = DistributedSetup.build(parallelism_sizes=ParallelismSizes(tp_size=4, pp_size=2), world_size=16)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    with mock.patch.object(dist.distributed_c10d, "_store_based_barrier") as barrier:
        mesh = MeshContext.realise(setup.plan)
    return mesh.size("dp"), barrier.call_count, dist.group.WORLD.bound_device_id


def test_the_groups_of_a_mesh_are_made_without_a_barrier():
    code = (
        "import sys; sys.path[:0] = ['tests']; import test_devices as t; "
        "found = t.on_rank_make_a_mesh_of_many(); assert found == (2, 0, None), found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def on_rank_join_a_group_that_exists(backends, environment, bound):
    chosen = []
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(dist, "get_backend_config", return_value=backends),
        mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            device_count=lambda: 8,
            current_device=lambda: 3,
            set_device=chosen.append,
        ),
    ):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            if name not in environment:
                os.environ.pop(name, None)
        dist.group.WORLD.bound_device_id = bound
        try:
            env = initialize_distributed()
        finally:
            dist.group.WORLD.bound_device_id = None
    return str(env.device), env.local_rank, [str(device) for device in chosen]


def on_rank_take_some_of_a_bound_group(own_mesh):
    mesh = DeviceMesh("cpu", torch.tensor([0]), mesh_dim_names=("dp_shard",))
    setup = DistributedSetup.build(ranks=[0])
    dist.group.WORLD.bound_device_id = torch.device("cuda", 0)
    try:
        with pytest.raises(RankError, match="the mesh has 1 of the 2 ranks, and the process group is bound to cuda:0"):
            MeshContext.from_meshes(mesh) if own_mesh else setup.mesh_context
    finally:
        dist.group.WORLD.bound_device_id = None


def test_some_ranks_of_a_group_that_is_bound_to_a_device_are_refused(ranks):
    for own_mesh in (True, False):
        ranks(2).run(on_rank_take_some_of_a_bound_group, own_mesh)


LAUNCHED = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("backends", "environment", "bound", "device", "local_rank"),
    [
        ("cpu:gloo,cuda:nccl", {}, None, "cuda:3", 3),  # as torch.multiprocessing.spawn leaves it
        ("cpu:gloo,cuda:nccl", LAUNCHED, None, "cuda:1", 1),
        ("cuda:nccl", LAUNCHED, torch.device("cuda", 5), "cuda:5", 1),
        ("cpu:gloo", LAUNCHED, None, "cpu", 1),
    ],
)
def test_a_group_that_exists_keeps_the_device_of_whoever_made_it(
    ranks, backends, environment, bound, device, local_rank
):
    (found,) = ranks(1).run(on_rank_join_a_group_that_exists, backends, environment, bound)
    assert found == (device, local_rank, [] if device == "cpu" else [device])


def on_rank_add_adapters_beside_shards_elsewhere(folder):
    setup = DistributedSetup.build(strategy=FSDP2Config(offload_policy="cpu"))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    import peft

    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))  # where the shards are
    moved = []
    on_card = mock.patch.object(MeshContext, "device", torch.device("meta"))  # in the place of a card
    # torch gives no parameter the data of a meta tensor, as it does that of a card.
    with on_card, mock.patch.object(torch.Tensor, "to", lambda data, device: moved.append(str(device)) or data):
        adapters([adapted], setup.mesh_context, setup.plugins)
    added = [name for name, _ in adapted.named_parameters() if name.endswith("default.weight")]
    return moved, len(added)


def test_adapters_are_where_the_model_computes_and_not_where_its_shards_are(ranks):
    ((moved, added),) = ranks(1).run(on_rank_add_adapters_beside_shards_elsewhere, checkpoint("llama"))
    assert added and moved == ["meta"] * added


def test_replicas_of_offloaded_shards_are_compared_beside_adapters_on_the_device():
    seen = []
    with (
        FakeTensorMode(),
        mock.patch.object(replica_check, "digest", lambda tensor: tensor.sum().long()),
        mock.patch.object(torch, "stack", lambda tensors: seen.extend(str(tensor.device) for tensor in tensors)),
    ):
        shard, adapter = torch.empty(4, 3), torch.empty(5, device="cuda")
        replica_check.digests_on(torch.device("cuda", 0), [shard, adapter, shard.new_zeros(0)])
    assert seen == ["cuda:0"] * 3  # which torch.stack wants on one device


def test_a_malformed_state_of_a_device_is_found_before_any_generator_changes():
    states = rng_state.capture() | {"cuda": torch.zeros(3, dtype=torch.uint8)}
    generators = mock.patch.object(torch, "Generator", return_value=torch.Generator())
    rng_state.check(states)  # where there is no device, nothing of it is restored
    with generators, mock.patch.object(torch.cuda, "is_available", return_value=True), pytest.raises(RuntimeError):
        rng_state.check(states)


def test_nothing_is_locked_for_shards_that_are_all_empty():
    with mock.patch.object(torch.cuda, "cudart", side_effect=AssertionError("locks an empty range")):
        assert len(host_copy._page_locked(0)) == 0


def test_copies_for_an_asynchronous_save_do_not_share_memory():
    tensors = {"a": torch.arange(3.0), "b": torch.arange(4)}
    copies = to_host(tensors)
    tensors["a"].zero_()
    assert copies["a"].tolist() == [0.0, 1.0, 2.0] and copies["b"].tolist() == [0, 1, 2, 3]


def test_the_memory_for_copies_is_locked_once_and_again_for_more():
    calls = []
    cuda = SimpleNamespace(
        cudaError=SimpleNamespace(success=0),
        cudaHostRegister=lambda address, size, flags: calls.append(size) or 0,
        cudaHostUnregister=lambda address: calls.append("unlocked"),
    )
    with (
        mock.patch.object(torch.cuda, "cudart", return_value=cuda),
        mock.patch.object(host_copy, "_locked", None),
        torch.device("meta"),  # in the place of torch.set_default_device("cuda")
    ):
        first = host_copy._page_locked(100)
        assert first.device.type == "cpu" and host_copy._page_locked(60) is first
        assert len(host_copy._page_locked(200)) == 200
    assert calls == [100, "unlocked", 200]


def test_memory_that_cuda_cannot_lock_is_an_error_with_a_way_out():
    cuda = SimpleNamespace(cudaError=SimpleNamespace(success=0), cudaHostRegister=lambda *_: 2)
    with (
        mock.patch.object(torch.cuda, "cudart", return_value=cuda),
        mock.patch.object(host_copy, "_locked", None),
        mock.patch.object(torch, "zeros", side_effect=RuntimeError("CUDA error: out of memory")) as next_kernel,
        pytest.raises(CheckpointError, match=r"cannot lock 100 bytes .* save without asynchronous=True"),
    ):
        host_copy._page_locked(100)
    next_kernel.assert_called_once_with(1, device="cuda")  # which CUDA tells the failure, and no kernel of the user's


def on_rank_store_in_bfloat16(folder):
    setup = DistributedSetup.build()
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"stored in bfloat16.*load with dtype=torch.float32"):
        setup.runtime(model).optimizer(torch.optim.AdamW, lr=1e-5)


def test_an_optimizer_of_bfloat16_parameters_warns_of_lost_updates(ranks):
    ranks(1).run(on_rank_store_in_bfloat16, checkpoint("llama"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_script_for_a_device_starts_every_check_without_one():
    command = ["bash", "benchmarks/gpu.sh", "--check", "--seconds", "1000"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]

"""What the loaders return is a transformers model: what people do with one works on all ranks together."""

import pytest
import torch
import torch.distributed as dist
import transformers

from nemo_dist import DDPConfig, DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, ParallelismSizes
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.precision import FP32

PROMPT = torch.tensor([[5, 7, 11], [2, 3, 4]])
SETUPS = {
    "fsdp2": (2, FSDP2Config(mp_policy=FP32), {}),
    "ddp": (2, DDPConfig(), {}),
    "tp": (2, FSDP2Config(mp_policy=FP32), {"tp_size": 2}),
    "cp": (2, FSDP2Config(mp_policy=FP32), {"cp_size": 2}),
    "hsdp": (4, FSDP2Config(mp_policy=FP32), {"dp_replicate_size": 2}),
    "fsdp2 x tp": (4, FSDP2Config(mp_policy=FP32), {"tp_size": 2}),
}


def on_rank_use(folder, strategy, sizes, out):
    setup = DistributedSetup.build(strategy=strategy, parallelism_sizes=ParallelismSizes(**sizes))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    tokens = model.generate(PROMPT, max_new_tokens=5, do_sample=False)
    model.save_pretrained(out, is_main_process=dist.get_rank() == 0)
    return tokens, model.num_parameters()


@pytest.mark.parametrize("name", SETUPS)
def test_a_sharded_model_generates_and_saves_itself(ranks, name, tmp_path):
    world, strategy, sizes = SETUPS[name]
    folder = checkpoint("llama")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = plain.generate(PROMPT, max_new_tokens=5, do_sample=False)
    for tokens, parameters in ranks(world).run(on_rank_use, folder, strategy, sizes, tmp_path):
        assert torch.equal(tokens, expected)
        assert parameters == plain.num_parameters()
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(dict(saved.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    assert saved.config.to_dict() == plain.config.to_dict() | {"_name_or_path": str(tmp_path)}


def on_rank_resize(folder, strategy, sizes):
    setup = DistributedSetup.build(strategy=strategy, parallelism_sizes=ParallelismSizes(**sizes))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup)
    tokens = model.config.vocab_size
    same = [model.resize_token_embeddings(), model.resize_token_embeddings(tokens)]
    with pytest.raises(ValueError) as refusal:
        model.resize_token_embeddings(tokens + 1, pad_to_multiple_of=4)
    return [one is model.get_input_embeddings() for one in same], tokens, str(refusal.value)


@pytest.mark.parametrize("name", ["fsdp2", "ddp", "tp"])
def test_the_vocabulary_of_a_sharded_model_is_not_resized(ranks, name):
    world, strategy, sizes = SETUPS[name]
    for unchanged, tokens, refusal in ranks(world).run(on_rank_resize, checkpoint("llama"), strategy, sizes):
        assert unchanged == [True, True]
        assert f"cannot be resized from {tokens} tokens to {tokens + 4}; load it in one process" in refusal

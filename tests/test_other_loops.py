"""What works beside nemo_dist, and which loops of others refuse a loaded model as they start."""

import sys
from importlib.util import find_spec

import peft
import pytest
import torch
import transformers
from torch.utils.data import Dataset, DistributedSampler

from nemo_dist import DistributedSetup, FSDP2Config, NeMoAutoModelForCausalLM, initialize_distributed
from nemo_dist.recipe.config import LoggingSection
from nemo_dist.recipe.documents import documents
from nemo_dist.recipe.metrics import Metrics
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.precision import FP32


class Lines(Dataset):
    """Sequences of tokens, as any map-style dataset gives them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = torch.arange(3, 11) + index
        return {"input_ids": row, "labels": row}


def loaded(folder, adapters=False):
    initialize_distributed("gloo")
    setup = DistributedSetup.build(strategy=FSDP2Config(mp_policy=FP32))
    model = NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, dtype=torch.float32)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return setup, peft.get_peft_model(model, lora) if adapters else model


def on_rank_start_trainer(folder, out, adapters):
    _, model = loaded(folder, adapters)
    arguments = transformers.TrainingArguments(out, report_to=[], use_cpu=True)
    with pytest.raises(TypeError) as caught:
        transformers.Trainer(model, arguments, train_dataset=Lines())
    return str(caught.value)


@pytest.mark.parametrize("adapters", [False, True])
def test_trainer_refuses_a_loaded_model_as_it_starts(on_ranks, tmp_path, adapters):
    for message in on_ranks(2, on_rank_start_trainer, checkpoint("llama"), tmp_path, adapters):
        assert "transformers' Trainer cannot train a model that was loaded with a distributed_setup" in message
        assert "Train it with setup.runtime(model)" in message


def on_rank_prepare(folder):
    from accelerate import Accelerator

    _, model = loaded(folder)
    with pytest.raises(TypeError) as caught:
        Accelerator(cpu=True).prepare(model)
    return str(caught.value)


def test_accelerator_refuses_a_loaded_model_as_it_is_prepared(on_ranks):
    for message in on_ranks(2, on_rank_prepare, checkpoint("llama")):
        assert "accelerate's Accelerator cannot train a model that was loaded" in message


def test_a_model_that_is_loaded_without_a_setup_is_theirs(tmp_path):
    model = NeMoAutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    arguments = transformers.TrainingArguments(
        tmp_path, report_to=[], use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True
    )
    assert transformers.Trainer(model, arguments, train_dataset=Lines()).train().global_step == 1


def on_rank_read(folder, out):
    """Train on rows of datasets, in a loader of torchdata that a checkpoint brings back to where it was."""
    from datasets import Dataset as Rows
    from torchdata.stateful_dataloader import StatefulDataLoader

    setup, model = loaded(folder)
    runtime = setup.runtime(model)
    data = Rows.from_list(
        [{name: value.tolist() for name, value in row.items()} for row in (Lines()[i] for i in range(8))]
    )

    def loader():
        rows = data.with_format("torch")
        sampler = DistributedSampler(rows, num_replicas=runtime.dp_size, rank=runtime.dp_rank, shuffle=False)
        return StatefulDataLoader(rows, batch_size=2, sampler=sampler)

    first = loader()
    batches = iter(first)
    runtime.forward_backward(next(batches))
    runtime.save(out, data=first)
    again = loader()
    runtime.load(out, data=again)
    return next(iter(again))["input_ids"].tolist(), next(batches)["input_ids"].tolist()


def test_rows_of_datasets_and_loaders_of_torchdata_go_on_where_they_were(on_ranks, tmp_path):
    pytest.importorskip("datasets")
    pytest.importorskip("torchdata")
    for again, once in on_ranks(2, on_rank_read, checkpoint("llama"), tmp_path / "run"):
        assert again == once


def test_folders_of_datasets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}]).save_to_disk(tmp_path / "rows")
    assert [document.text for document in documents(str(tmp_path / "rows"))] == ["one", "two"]


def test_folders_of_datasets_are_refused_in_words_without_it(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="was saved by datasets, which is not installed"):
        list(documents(str(tmp_path)))


def written(section, folder):
    metrics = Metrics.open(section, folder, 0, {"model": {"path": "x"}})
    metrics.write(1, {"loss": 2.5})
    metrics.close()


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written(LoggingSection(tensorboard=True), tmp_path)
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 2.5)]


def test_wandb_gets_the_numbers(tmp_path):
    pytest.importorskip("wandb")
    written(LoggingSection(wandb={"mode": "offline", "project": "x"}), tmp_path)
    assert list(tmp_path.rglob("*.wandb"))


def on_rank_load_quantized(folder):
    initialize_distributed("gloo")
    setup = DistributedSetup.build()
    with pytest.raises(ImportError) as caught:
        NeMoAutoModelForCausalLM.from_pretrained(
            folder, distributed_setup=setup, quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True)
        )
    with pytest.raises(TypeError, match="load_in_4bit -> nothing, weights that stay quantized cannot be sharded"):
        NeMoAutoModelForCausalLM.from_pretrained(folder, distributed_setup=setup, load_in_4bit=True)
    return str(caught.value)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed here")
def test_a_quantized_load_says_what_is_missing(on_ranks):
    for message in on_ranks(2, on_rank_load_quantized, checkpoint("llama")):
        assert "bitsandbytes" in message

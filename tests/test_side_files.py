"""What lies beside the weights: configs, code and tokenizer, as plain transformers writes them for the same model."""

import errno
import json
import shutil
import sys
import textwrap

import checkpoint_runs as runs
import pytest
import torch
import torch.distributed as dist
import transformers

from nemo_dist import (
    CheckpointError,
    DistributedSetup,
    NeMoAutoModelForCausalLM,
    export_checkpoint,
    initialize_distributed,
)
from nemo_dist.checkpoint.hf_side_files import write_companions
from nemo_dist.testing.equivalence import checkpoint
from nemo_dist.testing.tensors import saved_weights
from nemo_dist.testing.tiny_models import SPECIMENS


@pytest.fixture(scope="module")
def setup():
    initialize_distributed("gloo")
    yield DistributedSetup.build(strategy=runs.FSDP2)
    dist.destroy_process_group()


def loaded(setup, source, **keywords):
    return NeMoAutoModelForCausalLM.from_pretrained(source, distributed_setup=setup, **keywords)


def json_of(path):
    return json.loads(path.read_text())


# ---- code ----

CODE = """
    import transformers

    class OwnedConfig(transformers.LlamaConfig):
        model_type = "owned_llama"

    class OwnedModel(transformers.LlamaForCausalLM):
        config_class = OwnedConfig
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A module of a user with a config and a model that are registered to be saved with their code."""
    (tmp_path / "owned.py").write_text(textwrap.dedent(CODE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "owned", raising=False)
    import owned

    owned.OwnedConfig.register_for_auto_class()
    owned.OwnedModel.register_for_auto_class("AutoModelForCausalLM")
    transformers.AutoConfig.register("owned_llama", owned.OwnedConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(owned.OwnedConfig, owned.OwnedModel, exist_ok=True)
    return owned


@pytest.mark.parametrize("way", ["from_config", "from_pretrained"])
def test_code_of_a_user_is_exported_as_one_process_does(setup, own_code, tmp_path, way):
    config = own_code.OwnedConfig(**SPECIMENS["llama"].config().to_dict())
    plain = own_code.OwnedModel(config)
    plain.save_pretrained(tmp_path / "plain")
    if way == "from_config":
        model = NeMoAutoModelForCausalLM.from_config(own_code.OwnedConfig(**config.to_dict()), distributed_setup=setup)
    else:
        SPECIMENS["llama"].make(0).save_pretrained(tmp_path / "weights")
        model = loaded(setup, tmp_path / "weights", config=own_code.OwnedConfig(**config.to_dict()))
    assert type(model).__name__ == "FSDPOwnedModel", "a sharded class has another name and module"
    before = model.config.to_dict()
    setup.runtime(model).export(tmp_path / "out")
    assert model.config.to_dict() == before
    expected = {"AutoConfig": "owned.OwnedConfig", "AutoModelForCausalLM": "owned.OwnedModel"}
    assert json_of(tmp_path / "plain" / "config.json")["auto_map"] == expected
    assert json_of(tmp_path / "out" / "config.json") == json_of(tmp_path / "plain" / "config.json")
    names = [sorted(path.name for path in (tmp_path / folder).glob("*.py")) for folder in ("out", "plain")]
    assert names == [["owned.py"], ["owned.py"]]


def test_a_class_that_no_file_has_is_saved_without_its_code(setup, own_code, tmp_path, monkeypatch):
    monkeypatch.setattr(own_code.OwnedModel, "__module__", "__main__")
    monkeypatch.setattr(own_code.OwnedConfig, "_auto_class", None)
    config = own_code.OwnedConfig(**SPECIMENS["llama"].config().to_dict())
    (tmp_path / "out").mkdir()
    write_companions(tmp_path / "out", own_code.OwnedModel(config))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "generation_config.json"]


# ---- tokenizer ----


def hub(cache, name, of_revision):
    """Make a cache of the hub, with a tokenizer in each of the commits that *of_revision* has by revision."""
    place = cache / f"models--{name.replace('/', '--')}"
    for number, (revision, subfolder) in enumerate(of_revision.items()):
        commit = str(number) * 40
        snapshot = place / "snapshots" / commit / subfolder
        shutil.copytree(checkpoint("llama"), snapshot)
        (snapshot / "tokenizer.json").write_text(f'"{revision}"')
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)


@pytest.mark.parametrize(("revision", "subfolder"), [("main", ""), ("v2", ""), ("v3", "deep/model")])
def test_the_tokenizer_of_the_loaded_revision_is_exported(setup, tmp_path, monkeypatch, revision, subfolder):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # transformers asks for adapters all the same
    hub(tmp_path / "cache", "some/model", {"main": "", "v2": "", "v3": "deep/model"})
    place = {"cache_dir": tmp_path / "cache", "revision": revision, "subfolder": subfolder}
    model = loaded(setup, "some/model", local_files_only=True, **place)
    setup.runtime(model).export(tmp_path / "out")
    assert json_of(tmp_path / "out" / "tokenizer.json") == revision


@pytest.mark.parametrize("with_tokenizer", ["whole", "whole/model"])
def test_a_tokenizer_beside_the_subfolder_of_the_model_is_exported(setup, tmp_path, monkeypatch, with_tokenizer):
    shutil.copytree(checkpoint("llama"), tmp_path / "whole" / "model")
    (tmp_path / with_tokenizer / "tokenizer.json").write_text('"mine"')
    monkeypatch.chdir(tmp_path)
    model = loaded(setup, "whole", subfolder="model")
    monkeypatch.chdir(tmp_path / "whole")
    setup.runtime(model).export(tmp_path / "out")
    assert json_of(tmp_path / "out" / "tokenizer.json") == "mine"


def test_what_lies_in_the_subfolder_says_whether_it_loads(setup, tmp_path):
    shutil.copytree(checkpoint("llama"), tmp_path / "model")
    (tmp_path / ".metadata").write_bytes(b"of torch.distributed.checkpoint")
    loaded(setup, tmp_path, subfolder="model")
    (tmp_path / ".metadata").rename(tmp_path / "model" / ".metadata")
    loaded(setup, tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.rename(tmp_path / file.name)
    with pytest.raises(CheckpointError, match=r"model is a checkpoint of torch\.distributed.* does not read"):
        loaded(setup, tmp_path, subfolder="model")


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": 3}', '{"metadata": {}, "weight_map": {"a": null}}', "[" * 9999]
)
def test_a_damaged_index_of_weight_files_is_named(setup, tmp_path, index):
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is damaged: "):
        loaded(setup, model)


# ---- configs that transformers does not save ----


def touched(model):
    model.generation_config.temperature = 0.9  # does nothing without do_sample


def misplaced(model):
    model.config.num_beams = 3


@pytest.mark.parametrize(("harm", "name"), [(touched, "temperature"), (misplaced, "num_beams")])
def test_a_config_that_transformers_does_not_save_is_in_a_checkpoint_and_no_export(setup, tmp_path, harm, name):
    model = loaded(setup, checkpoint("llama"))
    runtime = setup.runtime(model)
    harm(model)
    with pytest.warns(UserWarning, match=f"has values that transformers does not save(.|\n)*{name}"):
        runtime.save(tmp_path / "saved")
    runtime.load(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=f"transformers does not save (.|\n)*{name}(.|\n)*Change model"):
        runtime.export(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    export_checkpoint(
        tmp_path / "saved", tmp_path / "out"
    )  # as of a published config: nobody changed it since the load
    if harm is touched:
        assert json_of(tmp_path / "out" / "generation_config.json")["temperature"] == 0.9


# ---- dtype ----


class CodecConfig(transformers.LlamaConfig):
    model_type = "codec_llama"


class WithCodec(transformers.LlamaForCausalLM):
    """Has a part that transformers keeps in float32, and whose name is the first in the alphabet."""

    config_class = CodecConfig
    _keep_in_fp32_modules_strict = ["a_codec"]

    def __init__(self, config):
        super().__init__(config)
        self.a_codec = torch.nn.Linear(2, 2)
        self.post_init()


def test_the_dtype_in_the_config_is_that_which_transformers_writes(setup, tmp_path):
    transformers.AutoConfig.register("codec_llama", CodecConfig, exist_ok=True)
    transformers.AutoModelForCausalLM.register(CodecConfig, WithCodec, exist_ok=True)
    WithCodec(CodecConfig(**SPECIMENS["llama"].config().to_dict())).save_pretrained(tmp_path / "model")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    replicated = DistributedSetup.build(strategy="ddp")
    replicated.runtime(loaded(replicated, tmp_path / "model", dtype=torch.bfloat16)).export(tmp_path / "out")
    assert {str(tensor.dtype) for tensor in saved_weights(tmp_path / "out").values()} == {
        "torch.bfloat16",
        "torch.float32",
    }
    assert json_of(tmp_path / "out" / "config.json") == json_of(tmp_path / "plain" / "config.json")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_not_called_a_wrong_value_of_a_config(setup, tmp_path, monkeypatch):
    model = loaded(setup, checkpoint("llama", 0))
    monkeypatch.setattr(transformers.PreTrainedConfig, "save_pretrained", full)
    with pytest.raises(CheckpointError) as refused:
        setup.runtime(model).export(tmp_path / "out")
    assert "No space left on device" in str(refused.value) and "Change model.config" not in str(refused.value)
    with pytest.raises(CheckpointError, match="No space left on device"):
        setup.runtime(model).save(tmp_path / "saved")

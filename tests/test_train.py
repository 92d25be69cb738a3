"""A job from one YAML file: what it refuses before a rank starts, its data, its numbers, and how it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest
import torch
import transformers
from cases import cases, slow
from hypothesis import given
from hypothesis import strategies as st
from test_launchers import clean
from torch.nn.functional import log_softmax, logsigmoid
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from nemo_dist import RankError, RunFolder, TopologyError
from nemo_dist.checkpoint.preemption import CODE
from nemo_dist.cli.main import app
from nemo_dist.hf_model import IGNORED
from nemo_dist.mesh.launch_env import Launch
from nemo_dist.planning.device_flops import bfloat16_flops
from nemo_dist.plugin.comm_estimate import readable
from nemo_dist.recipe import job, throughput
from nemo_dist.recipe.config import DataSection, LoggingSection, ModelSection, Recipe, SchedulerSection
from nemo_dist.recipe.documents import documents
from nemo_dist.recipe.dry_run import described
from nemo_dist.recipe.job import judge, stream_of, train
from nemo_dist.recipe.metrics import FILE, Metrics
from nemo_dist.recipe.model import config_of, weightless
from nemo_dist.recipe.optimization import give_back, make_schedule, options_of
from nemo_dist.recipe.refusals import judge_schedule, say_what_stays
from nemo_dist.recipe.row_stream import RowStream
from nemo_dist.recipe.tokens import Row, byte_tokenizer, packed, rows_of, tokenizer_of

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
CHAT = str(EXAMPLES / "chat.jsonl")


def example(name, *changes):
    """Return the recipe of docs/examples, with its data where it is from any folder."""
    recipe = Recipe.from_yaml(EXAMPLES / f"{name}.yaml")
    paths = {"data.path": recipe.data.path} | ({"evaluate.path": recipe.evaluate.path} if recipe.evaluate else {})
    found = [f"{key}={ROOT / path}" for key, path in paths.items()]
    return Recipe.from_yaml(EXAMPLES / f"{name}.yaml", [*found, *changes])


def into(folder):
    return f"checkpoint.folder={folder}", f"checkpoint.export={folder / 'exported'}"


def lines(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def numbers(folder, *names):
    """Return the values of *names* by step, of the lines that have them."""
    return {(line["step"], name): line[name] for line in lines(folder) for name in names if name in line}


# ---- the sections ----

GOOD = {
    "model": {"path": "somewhere"},
    "data": {"path": CHAT},
    "training": {"steps": 3, "batch_size": 4},
}
WRONG = {
    "a section": ({"trainig": {}}, "unknown key 'trainig'; did you mean 'training'?"),
    "a key": ({"data": {"path": CHAT, "lenght": 4}}, "data has an unknown key 'lenght'; did you mean 'length'?"),
    "a value": ({"training": {"steps": 0, "batch_size": 4}}, "training.steps must be an int from 1 up (got 0)"),
    "a type": ({"data": {"path": CHAT, "packing": "yes"}}, "data.packing must be true or false (got 'yes')"),
    "what is needed": ({"training": {"steps": 3}}, "training needs batch_size"),
    "one of two": ({"training": {"batch_size": 4}}, "training needs one of steps and epochs"),
    "no model": ({"model": {"dtype": "float32"}}, "model needs one of path"),
    "labels": ({"data": {"path": CHAT, "train_on": "answer"}}, "did you mean 'answers'?"),
    "a loss": (
        {"loss": {"type": "dpoo"}},
        "loss.type must be one of cross_entropy, dpo (got 'dpoo'); did you mean 'dpo'?",
    ),
    "packed pairs": (
        {"loss": {"type": "dpo"}, "data": {"path": CHAT, "packing": True}},
        "data.packing puts rows together that loss.type 'dpo' compares",
    ),
    "half a pair": (
        {"loss": {"type": "dpo"}, "evaluate": {"path": CHAT, "rows": 3}},
        "evaluate.rows must be even, as loss.type 'dpo' takes pairs (got 3)",
    ),
    "the reference": (
        {"loss": {"type": "dpo"}, "model": {"path": str(ROOT)}, "checkpoint": {"export": f"{ROOT}/docs/.."}},
        f"checkpoint.export is model.path, {ROOT}, whose model is the reference of loss.type 'dpo'",
    ),
    "no folder": ({"checkpoint": {"every": 3}}, "checkpoint.folder must be given"),
    "no tokenizer": ({"model": {"config": {"model_type": "llama"}}}, "model.tokenizer must be given"),
    "endless": ({"training": {"epochs": float("inf"), "batch_size": 4}}, "training.epochs must be finite and above 0"),
    "a date": ({"data": {"path": CHAT, "date": "July"}}, "data.date must be a date, as 2024-07-26 (got 'July')"),
    "another dtype": (
        {"model": {"path": "x", "options": {"dtype": "bfloat16"}}},
        "model.options has dtype, whose place is model.dtype; move it there",
    ),
    "a dtype": ({"model": {"path": "x", "dtype": "bfloat61"}}, "(got 'bfloat61'); did you mean 'bfloat16'?"),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_a_section_that_is_wrong_is_refused_in_words(what):
    change, message = WRONG[what]
    with pytest.raises(ValueError) as caught:
        Recipe.from_dict(GOOD | change)
    assert message in str(caught.value)


def test_all_problems_are_said_at_once():
    with pytest.raises(ValueError) as caught:
        Recipe.from_dict(
            {"data": {"path": 3, "lenght": 3}, "training": {"steps": -1, "batch_size": 1}, "optimiser": {}}
        )
    for said in ("'lenght'", "data.path", "training.steps", "did you mean 'optimizer'?", "needs a section 'model'"):
        assert said in str(caught.value)


NAMES = {
    "optimizer.type=AdamV": "optimizer.type 'AdamV' is no class of torch.optim; did you mean 'Adam",
    "optimizer.weigth_decay=0.1": "optimizer has an unknown key 'weigth_decay'; did you mean 'weight_decay'?",
    "scheduler.type=cosin": "scheduler.type 'cosin' is no schedule of the recipe; did you mean 'cosine'?",
    "scheduler={warmup: 100}": "but the schedule 'constant' has none; set scheduler.type to one that has: c",
    "scheduler.num_cycle=2": "scheduler has an unknown key 'num_cycle'; did you mean 'num_cycles'?",
    "scheduler.type=warmup_stable_decay": "as the section sets it (TypeError: get_wsd_schedule() missing 1 required",
    "scheduler={type: cosine, num_cycles: x}": "scheduler.type 'cosine' does not run as the section sets it (could not",
    "scheduler={type: polynomial, warmup: 12}": "(ZeroDivisionError: ",  # in its last step
    "optimizer={type: LBFGS}": "(TypeError: LBFGS.step() missing 1 required positional argument: 'closure'); change",
    "optimizer.lr=fast": "optimizer.type 'AdamW' does not run as the section sets it (TypeError: ",
    "optimizer.betas=[0.9]": "optimizer.type 'AdamW' does not run as the section sets it",
    "optimizer.lr=.inf": "optimizer.lr must be of finite numbers (got inf)",
    "optimizer.weight_decay=yes": "optimizer.weight_decay must be of finite numbers (got True)",
    "optimizer.betas=[0.9, .nan]": "optimizer.betas must be of finite numbers (got [0.9, nan])",
    "data.path=docs/examples/chats.jsonl": "there is no docs/examples/chats.jsonl; did you mean 'chat.jsonl'?",
    "evaluate.path=/gone": "there is no /gone",
    "model.peft={peft_type: LORE}": "is no kind of adapters of PEFT; did you mean 'LORA'?",
    "model.peft={peft_type: LORA, rank: 4}": "model.peft has an unknown key 'rank'",
    "model.peft={peft_type: LORA, target_modules: all, layers_to_transform: [1]}": "model.peft is refused by PEFT: ",
    "model.config.model_type=lama": "model.config is refused by transformers: ",
    "model.config.hidden_size=wide": "model.config is refused by transformers: ",
    "logging.wandb={project: x}": "logging asks for wandb, which is not installed",
}


@pytest.mark.parametrize("change", sorted(NAMES))
def test_names_that_others_do_not_have_are_refused_before_a_rank_starts(change):
    with pytest.raises(ValueError) as caught:
        judge(example("sft", change))
    assert NAMES[change] in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [("loss.betta=0.1", "did you mean 'beta'"), ("loss.beta=high", r"loss.beta must be a number \(got 'high'\)")],
)
def test_options_that_a_loss_does_not_take_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        judge(example("dpo", change))


CHANGES = {
    "training": r"section\.key=value \(got 'training'\)",
    "data.path.of=3": "goes into 'path', which is no section",
    "training.steps=!!timestamp x": "the value of 'training.steps=!!timestamp x' has the tag|is no|must be an int",
    "data.path=!!python/object:os.system {}": "has the tag !!python/object:os.system in it",
    "data.path=[" + "[" * 400: "is not YAML that can be read: it nests more than 64 levels",
    "data.path={a: &a [*a]}": "is not YAML|contains itself",
    "data." + "x" * 5000: r"section\.key=value \(got 'data.xxx",
    "distributed=false": "must be a mapping",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change[:30])
def test_a_change_that_says_nothing_is_refused_in_few_words(change):
    with pytest.raises((ValueError, TypeError), match=CHANGES[change]) as caught:
        example("sft", change).setup(1)
    assert len(str(caught.value)) < 1000


FEW = {
    "too few": (1, 1, "1F1B", "1 rows in each of 1 batches"),
    "batches in one schedule": (2, 2, "1F1B", None),
    "enough": (2, 1, "1F1B", None),
    "filled up": (1, 1, "1F1B, pp_batch_size: 2", None),
    "any will do": (1, 1, "GPipe", None),
}


@pytest.mark.parametrize("what", FEW)
def test_too_few_rows_for_the_stages_of_a_pipeline_are_refused_before_the_model_loads(what):
    rows, accumulation, schedule, said = FEW[what]
    recipe = example(
        *("sft", f"training.batch_size={rows}", f"training.accumulation={accumulation}"),
        *("distributed.pp_size=2", f"distributed.pipeline={{pp_schedule: {schedule}}}"),
    )
    if said is None:
        judge_schedule(recipe, recipe.setup(2))
        return
    message = rf"needs at least .* 2 stages \(got 1\): training\.batch_size {rows} gives a rank {said}, and"
    with pytest.raises(TopologyError, match=message):
        described(recipe, recipe.setup(2))


def in_cache(cache, revisions):
    """Make a cache of the hub of a model and its tokenizer, by revision with another vocabulary and template.

    The tokenizer is beside the model, or, where that is in "below", above it.
    """
    place = cache / "models--some--model"
    (place / "refs").mkdir(parents=True)
    for number, (revision, subfolder) in enumerate(revisions.items()):
        snapshot = place / "snapshots" / (str(number) * 40)
        for folder in {snapshot / subfolder} | ({snapshot} if subfolder == "below" else set()):
            transformers.LlamaConfig(vocab_size=300 + number).save_pretrained(folder)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = revision
        tokenizer.save_pretrained(snapshot if subfolder == "below" else snapshot / subfolder)
        (place / "refs" / revision).write_text(str(number) * 40)


def test_options_of_the_loader_reach_the_config_and_the_tokenizer(tmp_path):
    in_cache(tmp_path, {"main": "", "v2": "", "v3": "deep", "v4": "below"})
    places = [{}, {"revision": "v2"}, *({"revision": r, "subfolder": s} for r, s in (("v3", "deep"), ("v4", "below")))]
    for number, place in enumerate(places):
        options = {"cache_dir": str(tmp_path), "local_files_only": True, **place}
        model = ModelSection(path="some/model", options=options)
        assert tokenizer_of(model, DataSection(path=CHAT)).chat_template == place.get("revision", "main")
        assert config_of(model).vocab_size == 300 + number
        other = ModelSection(path="another/model", tokenizer="some/model", options=options)  # at its own revision
        assert tokenizer_of(other, DataSection(path=CHAT)).chat_template == "main"


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_of_recipe"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_dry_run_makes_models_of_code_that_the_recipe_trusts(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own_code_of_recipe.py").write_text(OWN_CODE)
    own = {"AutoConfig": "own_code_of_recipe.OwnConfig", "AutoModelForCausalLM": "own_code_of_recipe.OwnModel"}
    config = example("sft").model.config | {"model_type": "own_of_recipe", "auto_map": own}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))

    found = weightless(ModelSection(path=str(tmp_path / "model"), options={"trust_remote_code": True}))
    assert type(found).__name__ == "OwnModel"


def test_rows_that_do_not_divide_over_the_ranks_are_refused():
    with pytest.raises(ValueError, match=r"4 rows, which 3 data-parallel ranks .* a multiple of 6"):
        example("sft").setup(3)


def test_changes_reach_any_depth_and_numbers_are_numbers():
    recipe = example(
        "sft",
        *("optimizer={options: {lr: 3e-4, betas: [9e-1, 95e-2]}}", "model.options={revision: '1e4'}"),
        *("distributed.mp_policy.param_dtype=bfloat16", "model.config={initializer_range: 2e-2}"),
        *("model.config.model_type=llama", "model.config.head_dim=8"),
    )

    assert recipe.optimizer.options == {"lr": 3e-4, "betas": [0.9, 0.95]}
    assert recipe.model.config["initializer_range"] == 2e-2 and recipe.model.options["revision"] == "1e4"
    assert recipe.distributed["mp_policy"]["param_dtype"] == "bfloat16"
    assert recipe.model.config["head_dim"] == 8
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_change_goes_into_a_section_without_keys(tmp_path):
    (tmp_path / "job.yaml").write_text("model: {path: x}\ndata: {path: y}\ntraining:\ncheckpoint:\n")
    changes = ["checkpoint.folder=run", "training.steps=3", "training.batch_size=1"]
    recipe = Recipe.from_yaml(tmp_path / "job.yaml", changes)
    assert (recipe.checkpoint.folder, recipe.training.steps) == ("run", 3)


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "nemo_dist.cli", "train", *map(str, arguments)],
        **{"cwd": ROOT, "env": clean() | {"OMP_NUM_THREADS": "1"}, "text": True} | options,
    )


@pytest.mark.parametrize("name", ["sft", "lora", "moe", "dpo"])
def test_a_dry_run_says_what_each_example_does(name, tmp_path):
    recipe = example(name, f"checkpoint.folder={tmp_path / 'run'}")
    said = described(recipe, recipe.setup(2))

    assert f"model: {'Qwen3Moe' if name == 'moe' else 'Llama'}ForCausalLM of" in said
    assert "labels" in said and f"checkpoints: {tmp_path / 'run'}" in said
    shown = {"sft": "packed of 16", "lora": "adapters of LORA", "moe": "which are 0.", "dpo": "16 rows, in pairs"}
    assert shown[name] in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changed", ["r=8", "use_dora=true", "modules_to_save=[lm_head]"])
def test_a_dry_run_counts_what_adapters_train(changed, tmp_path):
    """Adapters of rank 8 to 64, 32, 32 and 64 features in two layers; a direction's length for each with DoRA."""
    recipe = example("lora", f"checkpoint.folder={tmp_path / 'run'}", f"model.peft.{changed}")
    said = described(recipe, recipe.setup(2))

    adapters = 2 * (8 * (4 * 64 + 64 + 32 + 32 + 64) + (64 + 32 + 32 + 64 if "dora" in changed else 0))
    head = 264 * 64 if "lm_head" in changed else 0
    assert f"adapters of LORA: {adapters + head:,} parameters trained" in said
    assert f"all-reduce of gradients of adapters, once: {readable(4 * adapters)}" in said
    assert f"reduce-scatter of gradients, by block, once: {readable(4 * head // 2)}" in said


# ---- the data ----


def test_the_labels_of_a_conversation_are_what_the_assistant_says():
    tokenizer = byte_tokenizer()
    found = list(documents(CHAT))
    for document, row in zip(found, rows_of(DataSection(path=CHAT), tokenizer), strict=True):
        counted = row.tokens[row.labels != IGNORED]
        answers = [turn["content"] for turn in document.messages if turn["role"] == "assistant"]
        assert tokenizer.decode(counted) == "".join(f"{answer}<|end|>" for answer in answers)
        assert torch.equal(row.labels[row.labels != IGNORED], counted)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    (tmp_path / "template").write_text("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}")
    section = DataSection(path=CHAT, chat_template=str(tmp_path / "template"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (tmp_path / "template").read_text()

    with pytest.raises(ValueError, match=r"chat\.jsonl, line 1: the chat template writes turn .* in another way"):
        rows_of(section, tokenizer)
    assert rows_of(DataSection(path=CHAT, train_on="all"), tokenizer)


def test_a_template_that_asks_for_today_gets_the_date_of_the_recipe():
    tokenizer = byte_tokenizer()
    asks = "{% macro day() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}{{ day() if strftime_now is defined }}"
    tokenizer.chat_template = asks + tokenizer.chat_template
    first, *_ = rows_of(DataSection(path=CHAT, date="2024-07-26"), tokenizer)
    assert tokenizer.decode(first.tokens).startswith("26 Jul 2024<|")

    with pytest.raises(ValueError, match=r"line 1: the chat template failed: it writes the date of today.* data\.date"):
        rows_of(DataSection(path=CHAT), tokenizer)


TOOLS = '"tools": [{"type": "function", "function": {"name": "weather"}}]'
ASKED, ANSWERED = '{"role": "user", "content": "ab"}', '{"role": "assistant", "content": "cd"}'


@pytest.mark.parametrize(
    "turns",
    [f'"messages": [{ASKED}, {ANSWERED}]', f'"prompt": [{ASKED}], "chosen": [{ANSWERED}], "rejected": [{ANSWERED}]'],
)
def test_the_tools_of_a_conversation_go_to_the_template(turns, tmp_path):
    (tmp_path / "data.jsonl").write_text(f"{{{turns}, {TOOLS}}}\n")
    section, tokenizer = DataSection(path=str(tmp_path / "data.jsonl")), byte_tokenizer()
    pairs = "chosen" in turns
    with pytest.raises(ValueError, match=r"line 1 has tools, which the chat template does not write; take the field"):
        rows_of(section, tokenizer, pairs=pairs)
    tokenizer.chat_template = "{% if tools %}{{ tools[0].function.name }}{% endif %}" + tokenizer.chat_template
    for row in rows_of(section, tokenizer, pairs=pairs):
        assert tokenizer.decode(row.tokens) == "weather<|user|>ab<|end|><|assistant|>cd<|end|>"
        assert tokenizer.decode(row.tokens[row.labels != IGNORED]) == "cd<|end|>"


def test_the_end_that_a_tokenizer_adds_by_itself_counts_as_the_one_added_here(tmp_path):
    from tokenizers.processors import TemplateProcessing

    (tmp_path / "data.jsonl").write_text('{"prompt": "ab", "completion": "cd"}\n')
    section, tokenizer = DataSection(path=str(tmp_path / "data.jsonl")), byte_tokenizer()
    (expected,) = rows_of(section, tokenizer)
    end = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    (found,) = rows_of(section, tokenizer)

    assert found.labels[-1] == tokenizer.eos_token_id
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.labels, expected.labels)


def test_prompts_do_not_count_and_text_goes_on_in_the_next_row(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "ab", "completion": "cd"}\n\n{"text": "0123456789"}\n')
    tokenizer = byte_tokenizer()
    first, *windows = rows_of(DataSection(path=str(tmp_path / "data.jsonl"), length=5), tokenizer)

    assert tokenizer.decode(first.tokens[first.labels != IGNORED]) == "cd<|end|>"
    assert [tokenizer.decode(row.tokens) for row in windows] == ["01234", "56789"]  # its end is a row of one token
    assert [row.labels[0].item() for row in windows] == [IGNORED] * 2


def test_a_preference_is_two_rows_of_one_prompt(tmp_path):
    (tmp_path / "data.jsonl").write_text(
        '{"prompt": "ab", "chosen": "cd", "rejected": "e"}\n{"prompt": "abcdef", "chosen": "g", "rejected": ""}\n'
        '{"prompt": "", "chosen": "fgh", "rejected": "ijklmn"}\n'
    )
    tokenizer = byte_tokenizer()
    with pytest.warns(UserWarning, match="3 documents are longer than data.length 5 .* and 1 have no label"):
        found = rows_of(DataSection(path=str(tmp_path / "data.jsonl"), length=5), tokenizer, pairs=True)

    assert [tokenizer.decode(row.tokens) for row in found] == ["abcd<|end|>", "abe<|end|>", "fgh<|end|>", "ijklm"]
    counted = [tokenizer.decode(row.tokens[row.labels != IGNORED]) for row in found]
    assert counted == ["cd<|end|>", "e<|end|>", "gh<|end|>", "jklm"]  # the first token of a row follows nothing


@pytest.mark.parametrize(
    ("line", "pairs", "message"),
    [
        ('{"prompt": "a", "completion": "b"}', True, "line 1 is no preference; loss.type 'dpo' takes"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', False, "line 1 is a preference; set loss.type to 'dpo'"),
    ],
)
def test_preferences_are_for_a_loss_that_compares(line, pairs, message, tmp_path):
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        rows_of(DataSection(path=str(tmp_path / "data.jsonl")), byte_tokenizer(), pairs=pairs)


BAD_LINES = {
    "{": "line 2 is no JSON",
    '{"words": 1}': r"line 2 has the fields \['words'\], and none of messages",
    "[1]": "line 2 is no mapping",
    '{"messages": []}': "messages must be a list of turns",
    '{"messages": [{"content": "x"}]}': "a turn has a role and content",
    '{"text": 3}': "text must be text",
    '{"messages": [{"role": "user", "content": "x"}], "tools": "[]"}': r"tools must be a list of mappings \(got '\[\]'",
    '{"chosen": "a", "rejected": "b"}': "prompt must be text",
    '{"prompt": "a", "chosen": [], "rejected": []}': "chosen must be text",
}


@pytest.mark.parametrize("line", sorted(BAD_LINES))
def test_a_line_that_is_no_document_is_named(line, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"data\.jsonl, {BAD_LINES[line]}|data\.jsonl, line 2: {BAD_LINES[line]}"):
        list(documents(str(tmp_path / "data.jsonl")))


UNREADABLE = {
    "half a letter": ('{"text": "a\\ud83d"}', "has half of a surrogate pair"),
    "digits": ('{"text": ' + "1" * 5000 + "}", "is no JSON that can be read: Exceeds the limit"),
    "levels": ("[" * 100_000, "is no JSON that can be read: maximum recursion depth"),
}


@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.parametrize(("name", "where"), [("data.jsonl", "data.jsonl, line 1"), ("data.json", "data.json")])
def test_json_that_python_does_not_take_is_refused_with_its_place(what, name, where, tmp_path):
    line, message = UNREADABLE[what]
    (tmp_path / name).write_text(line)
    with pytest.raises(ValueError, match=f"{where} {message}"):
        list(documents(str(tmp_path / name)))


def test_a_chat_template_that_is_no_text_is_named(tmp_path):
    (tmp_path / "template").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"data\.chat_template: .*template is no text in UTF-8"):
        tokenizer_of(example("sft").model, DataSection(path=CHAT, chat_template=str(tmp_path / "template")))


JSON_FILES = {
    "lines.JSONL": '{"text": "one"}\n{"text": "two"}\n',
    "lines.json": '{"text": "one"}\n{"text": "two"}\n',
    "array.json": '[{"text": "one"},\n {"text": "two"}]',
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_in_any_usual_file_is_read_as_documents(name, tmp_path):
    (tmp_path / name).write_text(JSON_FILES[name])
    assert [document.text for document in documents(str(tmp_path / name))] == ["one", "two"]


OTHER_FILES = {
    "train.csv": "train.csv is a table; save it with datasets' save_to_disk, or write JSON lines",
    "train.PARQUET": "train.PARQUET is a table; save it",
    "README.md": r"has JSON, and \['README\.md'\], which would be read",
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_a_file_that_is_hardly_meant_as_text_is_refused(name, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / name).write_text("text,label\none,1\n")
    with pytest.raises(ValueError, match=OTHER_FILES[name]):
        list(documents(str(tmp_path)))


def test_a_path_that_is_not_there_gets_the_near_one():
    with pytest.raises(ValueError, match=r"there is no .*chats\.jsonl; did you mean 'chat\.jsonl'\?"):
        list(documents(str(EXAMPLES / "chats.jsonl")))


def rows(lengths):
    """Return rows whose tokens are all different."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    tokens = [
        torch.arange(start, start + length, dtype=torch.int32) for start, length in zip(starts, lengths, strict=True)
    ]
    return [Row(tokens=one, labels=one.clone(), lengths=(len(one),)) for one in tokens]


@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(9, 20))
def test_packing_keeps_every_token_in_order_and_never_cuts_a_sequence(lengths, most):
    given_rows = rows(lengths)
    found = list(packed(given_rows, most))

    assert torch.equal(torch.cat([row.tokens for row in found]), torch.arange(sum(lengths), dtype=torch.int32))
    assert [length for row in found for length in row.lengths] == lengths
    assert all(sum(row.lengths) == len(row.tokens) <= most for row in found)


def stream(given_rows, rank=0, ranks=1, accumulation=1, size=1, **more):
    return RowStream(rows=given_rows, rows_of_batch=size, accumulation=accumulation, ranks=ranks, rank=rank, **more)


def taken(one, steps):
    """Return the real tokens of each of the next *steps* steps of a stream."""
    found = []
    for _ in range(steps):
        batches = one.take()
        found.append([t for b in batches for t in b["input_ids"][b["labels"] != IGNORED].tolist()])
    return found


@given(
    st.lists(st.integers(2, 9), min_size=1, max_size=12),
    st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]),
    st.integers(0, 4),
    st.booleans(),
)
def test_the_rows_of_a_step_are_the_same_for_every_topology_and_after_every_stop(lengths, shape, before, shuffle):
    ranks, accumulation = shape
    given_rows, steps = rows(lengths), 3
    alone = stream(given_rows, size=4, shuffle=shuffle)
    whole = taken(alone, before + steps)
    parts = [
        stream(given_rows, rank, ranks, accumulation, 4 // (ranks * accumulation), shuffle=shuffle)
        for rank in range(ranks)
    ]
    stopped = stream(given_rows, size=4, shuffle=shuffle)
    taken(stopped, before)
    for part in parts:
        part.load_state_dict(stopped.state_dict())
    shares = [taken(part, steps) for part in parts]

    for step in range(steps):
        assert sorted(t for share in shares for t in share[step]) == sorted(whole[before + step])
    assert all(part.state_dict() == alone.state_dict() for part in parts)


def test_pairs_stay_together_in_every_order():
    one = stream(rows([2] * 20), size=4, together=2)
    order = [t for step in taken(one, 10) for t in step]  # two epochs
    assert sorted(order) == sorted([*range(40)] * 2) and order[:40] != order[40:]
    assert all(
        order[at : at + 4] == list(range(order[at], order[at] + 4)) and order[at] % 4 == 0 for at in range(0, 80, 4)
    )


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    given_rows = rows([2] * 20)
    one = stream(given_rows, size=20)
    first, second = taken(one, 2)
    assert sorted(first) == sorted(second) == list(range(40)) and first != second


def test_a_padding_token_that_the_model_does_not_have_is_not_used():
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    recipe = example("sft", f"model.config.vocab_size={size}")
    batches = stream_of(recipe, recipe.setup(1), tokenizer, recipe.data, 0).all()
    assert any("attention_mask" in batch for batch in batches)
    assert all(int(batch["input_ids"].max()) < size for batch in batches)


LEARNED = {
    "gpt2": {"n_positions": 60, "n_embd": 32, "n_head": 4, "n_layer": 1},
    "opt": {"max_position_embeddings": 60, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1},
    "gptj": {"n_positions": 60, "n_embd": 32, "n_head": 4, "n_layer": 1, "rotary_dim": 4},
}


@pytest.mark.filterwarnings("ignore:.* are longer than data.length")
@pytest.mark.parametrize("kind", LEARNED)
def test_rows_are_no_longer_than_the_positions_of_a_model(kind):
    config = {"model_type": kind, "vocab_size": 264, "initializer_range": 0.02, **LEARNED[kind]}
    recipe = example("sft", "data.length=60", "data.packing=false")
    recipe = attrs.evolve(recipe, model=attrs.evolve(recipe.model, config=config))
    tokenizer = byte_tokenizer()
    batches = stream_of(recipe, recipe.setup(1), tokenizer, recipe.data, 0).all()
    assert max(batch["input_ids"].shape[1] for batch in batches) == 60
    with torch.no_grad():
        made = transformers.AutoModelForCausalLM.from_config(config_of(recipe.model))
        assert made(**batches[0]).loss.isfinite()

    longer = attrs.evolve(recipe, data=attrs.evolve(recipe.data, length=61))
    for refused in (lambda: stream_of(longer, longer.setup(1), tokenizer, longer.data, 0), lambda: judged(longer)):
        with pytest.raises(ValueError, match=r"a row has 61 tokens, but the model has 60 positions; set data\.length"):
            refused()


def judged(recipe):
    return described(recipe, recipe.setup(1))


@pytest.mark.filterwarnings("ignore:.* are longer than data.length")
def test_rows_of_any_length_are_for_rotary_positions():
    recipe = example("sft", "data.length=60", "data.packing=false", "model.config.max_position_embeddings=32")
    batches = stream_of(recipe, recipe.setup(1), byte_tokenizer(), recipe.data, 0).all()
    assert max(batch["input_ids"].shape[1] for batch in batches) == 64


def test_a_position_in_other_data_is_refused():
    with pytest.raises(ValueError, match="the run was at row 2 of other data"):
        stream(rows([3, 4])).load_state_dict(stream(rows([3, 5]), taken=2).state_dict())


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 2))
def test_an_evaluation_counts_every_row_once(count, ranks, size):
    given_rows = rows([3] * count)
    shares = [stream(given_rows, rank, ranks, size=size).all() for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    seen = [t for share in shares for b in share for t in b["labels"][b["labels"] != IGNORED].tolist()]
    assert sorted(seen) == list(range(3 * count))


# ---- the numbers of a run ----


def test_lines_of_steps_that_are_trained_again_are_dropped(tmp_path):
    (tmp_path / FILE).write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    metrics = Metrics.open(LoggingSection(), tmp_path, 1, {})
    metrics.write(2, {"loss": 2.5})
    metrics.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 2.5}]


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    metrics = Metrics.open(LoggingSection(), tmp_path, 0, {})
    metrics.write(1, {"loss": float("nan"), "norm": float("inf"), "lr": 0.5})
    assert (tmp_path / FILE).read_text() == '{"step": 1, "loss": null, "norm": null, "lr": 0.5}\n'


def test_the_numbers_of_an_earlier_run_are_kept_beside(tmp_path):
    for loss in (3, 4, 5):
        metrics = Metrics.open(LoggingSection(), tmp_path, 0, {})
        metrics.write(1, {"loss": loss})
    kept = [json.loads((tmp_path / f"{FILE}{end}").read_text())["loss"] for end in (".1", ".2", "")]
    assert kept == [3, 4, 5]


def test_a_run_that_an_error_ends_is_no_finished_one_in_wandb(monkeypatch, tmp_path):
    ended = []
    tracked = SimpleNamespace(finish=lambda exit_code: ended.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: tracked))  # which tests do not install
    for errors in ([], [RuntimeError]):
        with suppress(RuntimeError), closing(Metrics.open(LoggingSection(wandb={}), tmp_path, 0, {})):
            for error in errors:
                raise error
    assert ended == [0, 1]


def test_operations_are_those_that_torch_counts():
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    tokens = torch.randint(0, 96, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    # The counter sees all of a causal attention, and the formula the half that is not masked.
    norms = 6 * sum(p.numel() for p in model.parameters() if p.ndim == 1)  # no products
    half = throughput.operations_per_token(model, 16) - throughput.operations_per_token(model, 0)
    expected = tokens.numel() * (throughput.operations_per_token(model, 16) + half - norms)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_the_peak_is_that_of_the_longest_name():
    assert bfloat16_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert bfloat16_flops("NVIDIA L40S") == 362e12
    assert bfloat16_flops("GeForce GT 1030") is None


# ---- on ranks ----

# Without dropout, whose masks belong to a topology, and with a rate that does not look at the end of the run.
QUIET = (
    *("model.config.attention_dropout=0.0", "scheduler.type=constant_with_warmup"),
    *("training.steps=4", "training.accumulation=1", "evaluate.every=2"),
)
TOPOLOGIES = {
    "fsdp2": (),
    "tp": ("distributed.tp_size=2",),
    "cp": ("distributed.cp_size=2",),
    "pp": ("distributed.pp_size=2", "distributed.pipeline={pp_microbatch_size: 1}"),
}
NUMBERS = ("loss", "norm", "held_out_loss", "lr", "tokens")


def on_rank_train(*recipes):
    for recipe in recipes:
        train(Recipe.from_json(recipe))


def run(on_ranks, count, *recipes):
    on_ranks(count, on_rank_train, *[recipe.to_json() for recipe in recipes])


@pytest.fixture(scope="module")
def alone(on_ranks_of_module, tmp_path_factory):
    """The folder of the quiet run on one rank."""
    folder = tmp_path_factory.mktemp("alone")
    run(on_ranks_of_module, 1, example("sft", *QUIET, *into(folder)))
    return folder


@pytest.fixture(scope="module")
def on_ranks_of_module(ranks):
    return lambda count, function, *arguments: ranks(count).run(function, *arguments)


@pytest.mark.slow
@cases(("axis",), [(axis,) for axis in TOPOLOGIES])
def test_a_run_computes_the_same_under_every_topology(on_ranks, alone, tmp_path, axis):
    run(on_ranks, 2, example("sft", *QUIET, *into(tmp_path), *TOPOLOGIES[axis]))

    assert numbers(tmp_path, *NUMBERS) == pytest.approx(numbers(alone, *NUMBERS), rel=1e-5)


def test_the_export_has_the_held_out_loss_of_the_run(alone):
    out = alone / "exported"
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    held = rows_of(example("sft").evaluation_data, tokenizer)
    batches = stream(held, packing=True, pad_token=tokenizer.pad_token_id, shuffle=False).all()
    counts = [(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]
    with torch.no_grad():
        losses = []
        for batch in batches:
            batch.pop("attention_mask", None)
            losses.append(model(**batch, use_cache=False).loss)
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert mean.item() == pytest.approx(lines(alone)[-1]["held_out_loss"], rel=1e-5)


def test_a_run_goes_on_under_another_topology(on_ranks, alone, tmp_path):
    run(on_ranks, 2, example("sft", *QUIET, *into(tmp_path), "training.steps=2"))
    run(on_ranks, 2, example("sft", *QUIET, *into(tmp_path), *TOPOLOGIES["tp"]))

    assert numbers(tmp_path, "loss", "norm", "lr") == pytest.approx(numbers(alone, "loss", "norm", "lr"), rel=1e-5)


@cases(("axis",), [("dp",), slow("pp")])
def test_the_example_of_adapters_exports_what_peft_reads(on_ranks, tmp_path, axis):
    import peft

    recipe = example("lora", *into(tmp_path), "training.steps=2", f"distributed.{axis}_size=2")
    run(on_ranks, 2, recipe)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**recipe.model.config), dtype=torch.float32
    )
    model = peft.PeftModel.from_pretrained(base, tmp_path / "exported")

    trained = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert len(trained) == 8 and all(value.abs().sum() > 0 for value in trained)


def test_the_example_of_experts_computes_the_same_on_one_rank(on_ranks, tmp_path):
    steps = ("training.epochs=null", "training.steps=2")
    run(on_ranks, 2, example("moe", *into(tmp_path / "two"), *steps))
    run(on_ranks, 1, example("moe", *into(tmp_path / "one"), *steps, "distributed.ep_size=1"))

    assert numbers(tmp_path / "two", *NUMBERS) == pytest.approx(numbers(tmp_path / "one", *NUMBERS), rel=1e-5)


@pytest.mark.slow
def test_a_named_cross_entropy_is_the_loss_of_the_model(on_ranks, alone, tmp_path):
    run(on_ranks, 1, example("sft", *QUIET, *into(tmp_path), "loss.type=cross_entropy"))

    assert numbers(tmp_path, *NUMBERS) == pytest.approx(numbers(alone, *NUMBERS), rel=1e-5)


def by_hand(recipe):
    """Return losses and norms of the DPO recipe on one process, with plain torch."""
    torch.manual_seed(recipe.training.seed)
    config = transformers.AutoConfig.for_model(**recipe.model.config)
    model, reference = (transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    pairs = rows_of(recipe.data, byte_tokenizer(), pairs=True)
    order = stream(pairs, size=recipe.training.batch_size, together=2, pad_token=0)
    optimizer = torch.optim.AdamW(model.parameters(), **recipe.optimizer.options)
    found = {}
    for step in range(1, recipe.training.steps + 1):
        (batch,) = order.take()
        labels = batch.pop("labels")[:, 1:]
        scores = [of_rows(one, batch, labels) for one in (model, reference)]
        gained = scores[0] - scores[1].detach()
        loss = -logsigmoid(recipe.loss.options["beta"] * (gained[0::2] - gained[1::2])).mean()
        loss.backward()
        found[step, "loss"] = loss.item()
        found[step, "norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.clip).item()
        optimizer.step()
        optimizer.zero_grad()
    return found


def of_rows(model, batch, labels):
    chosen = log_softmax(model(**batch).logits[:, :-1], -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (chosen * (labels != IGNORED)).sum(1)


@cases(("count", "axis"), [(2, "dp"), slow(1, "dp"), *(slow(2, axis) for axis in ("tp", "cp", "pp"))])
def test_preferences_are_trained_as_by_hand(on_ranks, tmp_path, count, axis):
    pairs = ("distributed.pipeline={pp_microbatch_size: 2}",) if axis == "pp" else ()
    recipe = example("dpo", *into(tmp_path), f"distributed.{axis}_size={count}", *pairs)
    run(on_ranks, count, recipe)

    assert numbers(tmp_path, "loss", "norm") == pytest.approx(by_hand(recipe), rel=1e-5)
    assert len(numbers(tmp_path, "held_out_loss")) == 1


def test_preferences_go_on_with_the_reference_of_the_start(on_ranks, tmp_path):
    run(on_ranks, 1, example("dpo", *into(tmp_path / "whole")))
    run(on_ranks, 1, example("dpo", *into(tmp_path / "stopped"), "training.steps=2"))
    run(on_ranks, 1, example("dpo", *into(tmp_path / "stopped")))

    for name in ("loss", "norm", "held_out_loss"):
        whole, stopped = (numbers(tmp_path / folder, name) for folder in ("whole", "stopped"))
        assert whole.items() <= stopped.items()


# ---- refused on ranks, in words ----


def on_rank_train_own(recipes):
    train(Recipe.from_json(recipes[torch.distributed.get_rank()]))


DIFFERENT = {
    "rows": ("data.path={}/one", "data.path={}/two"),
    "held-out rows": ("evaluate.path={}/one", "evaluate.path={}/two"),
    "training.batch_size": ("training.batch_size=4", "training.batch_size=8"),
}


@cases(("what",), [("rows",), *map(slow, list(DIFFERENT)[1:])])
def test_ranks_with_other_data_or_another_recipe_are_refused(on_ranks, tmp_path, what):
    (tmp_path / "one").write_text("abcd" * 99)
    (tmp_path / "two").write_text("abcd" * 98)
    recipes = [example("sft", change.format(tmp_path)).to_json() for change in DIFFERENT[what]]
    with pytest.raises(RankError, match=rf"the ranks disagree about the recipe and its data:(.|\n)*- {what} is "):
        on_ranks(2, on_rank_train_own, recipes)


def test_what_only_a_rank_finds_wrong_is_refused_in_words(on_ranks, tmp_path):
    with pytest.raises(RankError, match=r"TopologyError: - no tokenizer at '.*gone'; give"):
        run(on_ranks, 1, example("sft", f"model.tokenizer={tmp_path / 'gone'}"))


def test_a_rank_of_torchrun_says_a_refusal_in_words(monkeypatch):
    def refuse(recipe):
        raise TopologyError(["too many rows"])

    monkeypatch.setattr(job, "run", refuse)
    monkeypatch.setattr(Launch, "read", lambda: Launch(rank=0, world_size=1, local_rank=0, told="a test"))
    result = CliRunner().invoke(app, ["train", str(EXAMPLES / "sft.yaml"), "--set", f"data.path={CHAT}"])
    assert result.exit_code == 2 and result.stderr == "error: too many rows\n"


def test_epochs_with_another_size_of_steps_are_refused_at_resume(on_ranks, alone):
    longer = ("training.steps=null", "training.epochs=9", f"checkpoint.folder={alone}", "training.batch_size=2")
    with pytest.raises(
        RankError, match=r"TopologyError: - training\.batch_size is 2, but the run read 16 rows in its 4 steps"
    ):
        run(on_ranks, 1, example("sft", *QUIET, *longer))


def test_a_run_that_has_done_more_steps_than_it_is_to_have_is_refused(on_ranks, alone):
    with pytest.raises(RankError, match=r"- training\.steps makes 3 steps, but the run in .* has done 4; make it 4"):
        run(on_ranks, 1, example("sft", *QUIET, f"checkpoint.folder={alone}", "training.steps=3"))


def test_a_run_that_begins_anew_beside_other_checkpoints_says_so(tmp_path, capsys):
    say_what_stays(RunFolder(tmp_path))
    assert not capsys.readouterr().out
    for step in (2, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
    say_what_stays(RunFolder(tmp_path))
    assert "has checkpoints of a run before, of steps 2, 4, and those of later steps" in capsys.readouterr().out


def scheduled(steps, **options):
    """Return an optimizer of *options* with a cosine schedule over so many *steps*."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], **options)
    return optimizer, make_schedule(SchedulerSection(type="cosine"), optimizer, steps)


def test_what_a_checkpoint_brings_gives_way_to_what_the_recipe_says():
    before, short = scheduled(4, lr=0.1)
    optimizer, schedule = scheduled(8, lr=0.5, weight_decay=0.3)
    for _ in range(2):
        before.step()
        short.step()
    others = ["lr 0.5", "weight_decay 0.3", "the rate"]
    for options, found in ((options_of(before), []), (options_of(optimizer), others)):
        one, its = (before, short) if not found else (optimizer, schedule)
        one.load_state_dict(before.state_dict())
        its.load_state_dict(short.state_dict())
        said = give_back(options, one, its)
        assert len(said) == len(found) and all(any(line.startswith(name) for line in said) for name in found)
    whole = scheduled(8, lr=0.5)
    for _ in range(2):
        whole[0].step()
        whole[1].step()

    for _ in range(6):
        assert schedule.get_last_lr() == whole[1].get_last_lr() == [optimizer.param_groups[0]["lr"]]
        for one in (optimizer, schedule, *whole):
            one.step()
    assert optimizer.param_groups[0]["weight_decay"] == 0.3


def test_a_run_that_goes_on_trains_as_its_recipe_says_now(on_ranks, tmp_path):
    asked = (*QUIET, *into(tmp_path), "scheduler={type: cosine}", "evaluate=null")
    run(on_ranks, 1, example("sft", *asked, "training.steps=2", "optimizer.lr=1e-2"))
    run(on_ranks, 1, example("sft", *asked, "training.steps=4", "optimizer.lr=1e-3"))

    # Of a cosine over 2 steps, and from its middle on over 4.
    rates = [1e-2, 5e-3, 5e-4, 5e-4 * (1 - 0.5**0.5)]
    assert list(numbers(tmp_path, "lr").values()) == pytest.approx(rates)


def on_rank_stop(recipe):
    """Return how often the metrics were closed in a run that is stopped."""
    closed = []

    def stop(*_):
        raise SystemExit(CODE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.Job, "_save", stop)
        patch.setattr(job.Metrics, "close", lambda self: closed.append(self))
        with pytest.raises(SystemExit):
            train(Recipe.from_json(recipe))
    return len(closed)


def test_the_numbers_of_a_run_that_is_stopped_are_closed(on_ranks, tmp_path):
    assert on_ranks(1, on_rank_stop, example("sft", *QUIET, *into(tmp_path)).to_json()) == [1]


# ---- stopped and started again ----

STEPS = 40
LONG = ("--nproc", 2, "--set", f"training.steps={STEPS}", "--set", "checkpoint.every=1000")


def sft(folder):
    given_folder = ["--set", f"checkpoint.folder={folder}", "--set", f"checkpoint.export={folder / 'exported'}"]
    return command("docs/examples/sft.yaml", *LONG, *given_folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_steps(process, folder, count):
    deadline = time.monotonic() + 240
    while not (folder / FILE).is_file() or len((folder / FILE).read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_started_again_has_the_losses_of_one_that_is_not(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    through = sft(whole)
    assert through.wait(240) == 0, through.communicate()[0]
    process = sft(stopped)
    wait_for_steps(process, stopped, 5)
    os.kill(process.pid, signal.SIGTERM)
    text = process.communicate(timeout=240)[0]
    assert process.returncode == CODE, text
    done = max(step for step, _ in numbers(stopped, "loss"))
    assert 5 <= done < STEPS and f"saved step {done}" in text
    again = sft(stopped)
    text = again.communicate(timeout=240)[0]
    assert again.returncode == 0 and f"goes on after step {done}" in text

    names = ("loss", "norm", "lr", "held_out_loss")
    assert numbers(stopped, *names) == numbers(whole, *names)
    assert len(numbers(whole, "loss")) == STEPS


@pytest.mark.slow
def test_torchrun_starts_the_ranks_of_a_recipe(tmp_path):
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "nemo_dist.cli", "train", "docs/examples/moe.yaml", "--set", f"checkpoint.folder={tmp_path}"]
    ran = subprocess.run([*launched, *arguments], cwd=ROOT, env=clean(), capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "loss" in lines(tmp_path)[0]


def test_a_recipe_is_refused_before_a_rank_starts(tmp_path):
    process = command(
        EXAMPLES / "sft.yaml", "--set", "trainig.steps=3", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    text = process.communicate(timeout=240)[0]
    assert process.returncode == 2 and "error: the recipe has an unknown key 'trainig'; did you mean" in text

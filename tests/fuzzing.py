"""Random input for ``build``, ``from_dict``, ``from_yaml``, recipes and the command line, and what may come of it.

Half of what is drawn is valid, so that a wrong value meets code that has accepted the others.
"""

import json
import linecache
import os
import string

import yaml

from nemo_dist import DistributedSetup, NemoDistError, ParallelismSizes, Registry
from nemo_dist.plugin.options import accepted_names

os.environ["HF_HUB_OFFLINE"] = "1"  # a drawn name of a model is not looked for on the hub

LONGEST = 10_000  # characters of a message
SIZES = ("tp_size", "pp_size", "cp_size", "ep_size", "dp_size", "dp_replicate_size")
STRATEGIES = ("fsdp2", "ddp", "megatron_fsdp", "FSDP2", "mfsdp", "default")
PLUGINS = ("context", "tensor", "pipeline", "moe", "recompute", *STRATEGIES)
DTYPES = ("float32", "bf16", "torch.float16", "bfloat61")
WORDS = (
    *("", "none", "None", "true", "all", "auto", "cpu", "cuda", "full", "selective", "1f1b", "zbv", "ulysses", "ring"),
    *(
        "~",
        "*",
        "<<",
        "a" * 9000,
        "1" * 5000,
        "ü\N{SNOWMAN}",
        "a\nb",
        "\x00",
        "!!python/object:os.system",
        "${oc.env:TP}",
    ),
)
REGISTRY = Registry()
CONFIGS = {name: REGISTRY.load(name).config_type for name in REGISTRY}
OPTIONS = sorted({name for kind in CONFIGS.values() for name in accepted_names(kind)})


class Refused(Exception):
    """The command line ended with code 2 and a message."""


class Loud:
    """Raises when it is written, compared or counted."""

    def __repr__(self):
        raise RuntimeError("no text")

    __bool__ = __len__ = __hash__ = __repr__

    def __eq__(self, other):
        raise RuntimeError("no comparison")


def bomb(levels=30):
    value = ["lol"]
    for _ in range(levels):
        value = [value] * 9
    return value


def knot():
    value = []
    value.append({"again": value})
    return value


def deep(levels=3000):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def junk(rng, level=0):
    """Return any value."""
    kind = rng.randrange(14 if level < 3 else 9)
    if kind < 3:
        return rng.choice((None, True, False, 0, 1, 2, 3, -1, 8, 2**31, 10**18, 10**5000))
    if kind < 4:
        return rng.choice((0.0, 1.5, -2.0, float("nan"), float("inf"), 1e300))
    if kind < 7:
        return rng.choice(WORDS)
    if kind < 8:
        return "".join(rng.choice(string.printable) for _ in range(rng.randrange(12)))
    if kind < 9:
        return rng.choice((b"fsdp2", object(), int, Loud(), 1j, range(3), {1, 2}, bomb(), knot(), deep(), Ellipsis))
    if kind < 12:
        return [junk(rng, level + 1) for _ in range(rng.randrange(4))]
    return {key(rng): junk(rng, level + 1) for _ in range(rng.randrange(4))}


def key(rng):
    return rng.choice((*OPTIONS, *SIZES, *WORDS, None, 1, 2.5, True, ("a", 1)))


def size(rng):
    return rng.choice((1, 1, 1, 1, 2, 2, 4, 3, None)) if rng.random() < 0.97 else junk(rng)


def policy(rng):
    fields = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs", "_target_", "parm_dtype")
    return {rng.choice(fields): rng.choice((*DTYPES, True, None)) for _ in range(rng.randrange(4))}


def option(rng, plugin, name):
    """Return a value for the option *name* of *plugin*: its default, one of the right kind, or junk."""
    chance = rng.random()
    if chance < 0.6:
        kind = CONFIGS[plugin]
        return kind.fixed[name].values[0] if name in kind.fixed else getattr(kind(), kind.renamed.get(name, name))
    if chance < 0.65:
        return junk(rng)
    if name.endswith("policy"):
        return rng.choice((None, "cpu", policy(rng), {"pin_memory": rng.choice((True, False, 1))}))
    if name == "tp_plan":
        return {rng.choice(("layers.*.mlp.up_proj", "lm_head", 3)): rng.choice(("colwise", "rowwise", "x", None))}
    if name == "pp_schedule":
        return rng.choice((None, "1f1b", "gpipe", "zbv", "interleaved", "dualpipev", "f1b", 3))
    if name == "module_fqns_per_model_part":
        return rng.choice(([["a"], ["b"]], [["a", "b"], ["b", "c"]], [], "ab", [1], [[1]]))
    return rng.choice((None, True, False, 0, 1, 2, 4, 7, 64, "all", "up", "down", "full", "auto", *DTYPES))


def some(rng, names, least=0, most=4):
    return rng.sample(names, rng.randint(least, min(most, len(names))))


def of_plugin(rng, plugin):
    """Return options for *plugin*, most of them its own."""
    own = accepted_names(CONFIGS[plugin])
    found = {name: option(rng, plugin, name) for name in some(rng, own)}
    if rng.random() < 0.1:
        found[key(rng)] = junk(rng)
    return found if rng.random() < 0.95 else junk(rng)


def section(rng):
    """Return a ``distributed:`` section."""
    found = {name: size(rng) for name in some(rng, SIZES, most=3)}
    strategy = rng.choice(STRATEGIES[:3])
    if rng.random() < 0.8:
        found["strategy"] = rng.choice((strategy, strategy, strategy.upper())) if rng.random() < 0.95 else junk(rng)
    options = accepted_names(CONFIGS[strategy])
    found |= {name: option(rng, strategy, name) for name in some(rng, options)}
    if rng.random() < (0.3 if "pp_size" in found else 0.03):
        found["pipeline"] = of_plugin(rng, "pipeline")
    if rng.random() < (0.3 if "ep_size" in found else 0.03):
        found["moe"] = of_plugin(rng, "moe")
    if rng.random() < 0.3:
        named = some(rng, PLUGINS[:5], most=2)
        found["plugins"] = rng.choice((named, named, {name: of_plugin(rng, name) for name in named}))
    if rng.random() < 0.05:
        found["extra"] = rng.choice(({"own": 2}, {"own": 1}, {"tp": 2}, {"9": 2}, {f"x{n}": 2 for n in range(99)}))
    if rng.random() < 0.3:
        found |= others(rng)
    if rng.random() < 0.05:
        found[key(rng)] = junk(rng)
    return found if rng.random() < 0.98 else junk(rng)


def text(rng, content=None):
    """Return the bytes of a YAML file, mostly one with a section; *content* is by default one that is no recipe."""
    content = content or {"model": {"name": "x"}, "distributed": plain(section(rng))}
    written = yaml.safe_dump(content, default_flow_style=rng.choice((True, False, None)), sort_keys=False)
    lines = written.splitlines()
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        place = rng.randrange(len(lines) + 1)
        lines.insert(place, rng.choice(LINES))
    if rng.random() < 0.3:
        letters = list("\n".join(lines))
        for _ in range(rng.randrange(1, 5)):
            letters[rng.randrange(len(letters))] = rng.choice("{}[]:,-!&*<>|'\"%@`#? \t\n\x07é1~")
        return "".join(letters).encode()
    return "\n".join(lines).encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1", "cp1252")), "replace")


LINES = (
    *("base: &b {tp_size: 2}", "  <<: *b", "<<: *b", "  <<: [*b, *b]", "  <<: 3", "  tp_size: 2", "  tp_size: *b"),
    *("x: !Model {a: 1}", "when: 2024-99-99", "  when: !!timestamp x", "  cp_size: !!bool 7", "  cp_size: !!int x"),
    *("  cp_size: !!float z", "  ? [a, b]\n  : 1", "  1: 2", "  ~: 3", "  on: 1", "---", "...", "%YAML 9.9"),
    *(
        "a: &a [*a]",
        "  strategy: &s [*s]",
        "  mp_policy: &m {param_dtype: *m}",
        "  strategy: !!python/object:os.system {}",
    ),
    "a0: &a0 [x]\n" + "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)),
    *("  strategy: *a11", "  plugins: *a11", "  " + "[" * 400, "  tp_plan: " + "{a: " * 70, "- " * 300 + "x"),
    *(
        "  plugins: {context: !!set {a}}",
        "  extra: !!omap [a: 2]",
        "  device_type: !!binary aGVsbG8=",
        "  tp_size: 0o17",
    ),
)


def plain(value, level=0):
    """Return *value* as YAML can write it."""
    if isinstance(value, dict):
        return {
            name if isinstance(name, str | int | bool | None) else str(name): plain(v, level + 1)
            for name, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item, level + 1) for item in value[:4]] if level < 5 else []
    if isinstance(value, int) and not isinstance(value, bool):
        return value if abs(value) < 10**300 else 10**30
    return value if isinstance(value, str | float | bool | None) else "object"


MODEL = {"model_type": "llama", "vocab_size": 264, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 2, "num_key_value_heads": 1}
TEXT = "A few words to train on, and a few more.\n" * 40
FILE = "the file with that text"
# Values of a recipe by section and key, the first ones right.
RECIPE = {
    "model": {
        "config": (MODEL, MODEL, MODEL, {"model_type": "llam"}, {**MODEL, "hidden_size": -1}, {}),
        "tokenizer": ("bytes", "bytes", "bytes", "no/such", 3),
        "dtype": ("float32", "bfloat16", "torch.float16", "Tensor", "float31"),
        "attn_implementation": (None, "sdpa", "eager", "flash", 1),
        "peft": (None, None, {"peft_type": "LORA", "r": 4}, {"peft_type": "LORRA"}, {"peft_type": "lora", "rr": 1}, {}),
        "options": ({}, {"use_cache": False}, [], {"config": 1}),
    },
    "data": {
        "path": (FILE, FILE, FILE, "/gone", "", "."),
        "length": (16, 64, 1, "16", 1.5),
        "packing": (True, False, "yes"),
        "shuffle": (True, False, 0),
        "text": ("text", None),
        "train_on": ("all", "answers", "answer"),
        "chat_template": (None, "/gone", 1),
    },
    "training": {
        "steps": (3, 1, 0, None, "3"),
        "epochs": (None, None, 1.5, float("nan"), float("inf"), -1),
        "batch_size": (48, 16, 8, 5, 0, 10**30),
        "accumulation": (1, 2, 0),
        "clip": (1.0, None, 0, "1", "1e-2"),
        "seed": (0, 1, -1, 10**30),
    },
    "optimizer": {
        "type": ("AdamW", "SGD", "Adam", "adamw", "Optimizer", 1),
        "lr": ("1e-3", 0.1, -1, "x", [1]),
        "betas": ([0.9, 0.95], [2, 3], [0.9], "0.9"),
        "options": ({}, {"lr": 0.1}, 3),
    },
    "scheduler": {
        "type": ("cosine", "constant", "linear", "greedy", "cosin"),
        "warmup": (0, 2, -1, 10**6),
        "num_cycles": (1, 0.5, "x"),
    },
    "checkpoint": {
        "folder": ("runs", None, "", "\x00", 3),
        "every": (2, None, 0),
        "keep_last": (1, None, 0, True),
        "asynchronous": (True, False, 1),
        "export": (None, "out", 3),
        "grace_seconds": (5, 0),
    },
    "evaluate": {"path": (FILE, "/gone"), "every": (None, 2, -1), "rows": (None, 1, 0)},
    "logging": {"every": (2, 0), "folder": (None, "logs", 1), "tensorboard": (False, 1), "wandb": (None, {}, [])},
}
NEEDED = ("model", "data", "training")


def job(rng, file):
    """Return the sections of a recipe that trains on *file*."""
    found = {}
    for name, keys in RECIPE.items():
        if name in NEEDED or rng.random() < 0.4:
            first = {"model": ("config", "tokenizer"), "data": ("path",), "training": ("steps", "batch_size")}
            chosen = {*first.get(name, ()), *some(rng, list(keys), most=3)}
            found[name] = {one: job_value(rng, keys[one], file) for one in keys if one in chosen}
    if rng.random() < 0.4:
        found["distributed"] = section(rng)
    if rng.random() < 0.1:
        where = rng.choice([found, *(part for part in found.values() if isinstance(part, dict))])
        where[key(rng)] = junk(rng)
    if rng.random() < 0.05:
        found.pop(rng.choice(list(found)))
    return plain(found)


def job_value(rng, values, file):
    chance = rng.random()
    value = values[0] if chance < 0.96 else rng.choice(values) if chance < 0.99 else junk(rng)
    if value is MODEL and rng.random() < 0.1:
        value = MODEL | {rng.choice((*MODEL, "rope_scaling", "dtype", "layer_types", "pad_token_id")): junk(rng)}
    return str(file) if value is FILE else value


def change(rng):
    """Return an argument of ``--set``."""
    name = rng.choice(list(RECIPE))
    where = rng.choice(
        (f"{name}.{rng.choice(list(RECIPE[name]))}", f"{name}.{rng.choice(WORDS)}", name, "distributed.tp_size")
    )
    value = rng.choice((*(str(one) for one in rng.choice(list(RECIPE[name].values()))), *LINES, *WORDS))
    return f"{where}{rng.choice(('=', '=', '=', '=', ''))}{value}"


ODD = ("plugins", "paln", "export", "verify", "demo", "new-plugin", "check", "")


def arguments(rng, file):
    """Return a command line; *file* holds a section."""
    found = ["explain" if rng.random() < 0.3 else "plan" if rng.random() < 0.9 else rng.choice(ODD)]
    if found[0] in ("verify", "demo"):  # only what is refused before torch is imported
        return [found[0], "--tp", rng.choice(("x", "1.5", "")), rng.choice(("--nproc", "--seed", "--gone"))]
    if found[0] == "export":
        paths = (*("", ".", "/", "\x00", "/etc/passwd", str(file)), *WORDS)
        return ["export", rng.choice(paths), rng.choice(paths), *some(rng, ("--dtype=x", "--max-shard-size=x"), most=1)]
    if found[0] == "new-plugin":
        return [
            "new-plugin",
            rng.choice((*WORDS, *PLUGINS, "token_meter", "--strategy")),
            "--into",
            str(file.parent / "new"),
        ]
    if found[0] == "check":  # only what is refused before pytest runs
        return ["plugins", "check", rng.choice(WORDS), *some(rng, ("--model", "llama", "x"), most=2)]
    for name in some(rng, ("--tp", "--pp", "--cp", "--ep", "--dp", "--dp-replicate", "--rank"), most=3):
        found += [name, str(rng.choice((1, 2, 2, 4, 3, 0, -1, 10**9))) if rng.random() < 0.9 else rng.choice(WORDS)]
    found += ["-n", str(rng.choice((1, 2, 4, 8, 16, 48, 16384, 10**30)))] if rng.random() < 0.8 else []
    found += ["--strategy", rng.choice((*STRATEGIES, *WORDS))] if rng.random() < 0.4 else []
    found += ["--config", str(rng.choice((file, file, f"{file}.gone", "/", "")))] if rng.random() < 0.3 else []
    return found + some(rng, ("--json", "--help", "--verison", "x"), most=1) * (rng.random() < 0.2)


def question(rng, file, model):
    """Return a command line of ``search``, ``dry-run`` or ``train``; *file* holds a recipe, *model* a config."""
    command, given = rng.choice(("search", "dry-run", "train")), rng.random
    if command == "train":
        found = [command, str(rng.choice((file, file, file, f"{file}.gone", "/"))), "--dry-run", "-n", str(number(rng))]
        return found + [word for _ in range(rng.randrange(3)) for word in ("--set", change(rng))]
    where = str(model) if given() < 0.8 else rng.choice((f"{model}x", str(file), "/", "", "a/b", *WORDS))
    sizes = [word for name in some(rng, ("--tp", "--pp", "--cp", "--ep", "--dp")) for word in (name, str(number(rng)))]
    if command == "dry-run":
        found = [command, where, "-n", str(number(rng)), *sizes]
        found += ["--rank", str(rng.choice((0, 1, 7, -1, 10**9)))] if given() < 0.4 else []
        found += ["--strategy", rng.choice((*STRATEGIES, *WORDS))] if given() < 0.3 else []
        return found + (["--config", str(file)] if given() < 0.3 else [])
    found = [
        command,
        "--model",
        where,
        "--gpus",
        str(number(rng)),
        "--seq",
        str(number(rng)),
        "--batch",
        str(number(rng)),
    ]
    found += ["--memory", rng.choice(("80GiB", "80GB", "1KB", "0", "1e9GB", "x", *WORDS))] if given() < 0.5 else []
    found += ["--hardware", rng.choice(("h100-8x", "h100", f"{file}:x", "/:x", *WORDS))] if given() < 0.3 else []
    found += ["--dtype", rng.choice((*DTYPES, "int8"))] if given() < 0.3 else []
    found += ["--imbalance", rng.choice(("1.25", "0", "-1", "nan", "inf", "x"))] if given() < 0.3 else []
    found += ["--top", str(number(rng))] if given() < 0.2 else []
    found += ["--best", str(number(rng))] if given() < 0.2 else []
    found += ["--strategy", rng.choice((*STRATEGIES, *WORDS))] if given() < 0.5 else []
    return found + sizes + (["--json"] if given() < 0.2 else [])


def number(rng):
    chance = rng.random()
    return rng.choice((1, 2, 4, 8, 8) if chance < 0.9 else (3, 0, -1, 10**9, 10**30) if chance < 0.95 else WORDS)


def keywords(rng):
    """Return the keywords of ``DistributedSetup.build``."""
    found = {"world_size": rng.choice((4, 8, 8, 16, 48)) if rng.random() < 0.97 else junk(rng)}
    if rng.random() < 0.8:
        name = rng.choice(STRATEGIES[:3])
        found["strategy"] = rng.choice((name, config(rng, name))) if rng.random() < 0.97 else junk(rng)
    if rng.random() < 0.8:
        sizes = {name: size(rng) for name in some(rng, SIZES, most=3)}
        found["parallelism_sizes"] = ParallelismSizes(**sizes) if rng.random() < 0.97 else junk(rng)
    for keyword, plugin in (("pipeline_config", "pipeline"), ("moe_parallel_config", "moe")):
        if rng.random() < 0.07:
            found[keyword] = of_plugin(rng, plugin)
    if rng.random() < 0.3:
        found["plugins"] = (
            rng.choice((("context",), ("tensor",), ("recompute",), "context")) if rng.random() < 0.9 else junk(rng)
        )
    return found | (others(rng) if rng.random() < 0.3 else {})


def others(rng):
    """Return the keywords besides sizes and plugins, most of them right."""
    valid = {
        "device_type": ("cpu", "cuda", None),
        "timeout_minutes": (5, 0.5, None, 0),
        "ranks": (None, [0, 1], [0, 1, 2, 3], [1, 0], [0, 0], [9], []),
        "activation_checkpointing": (True, False, "full", "selective", "half"),
    }
    return {name: rng.choice(valid[name]) if rng.random() < 0.9 else junk(rng) for name in some(rng, list(valid), 1, 2)}


def config(rng, name):
    return CONFIGS[name](**{one: option(rng, name, one) for one in some(rng, accepted_names(CONFIGS[name]), most=2)})


def outcome(call, allowed):
    """Return "built", "refused" or what is wrong with how *call* ended."""
    try:
        call()
    except allowed as error:
        words = str(error)
        if len(words) > LONGEST:
            return f"a message of {len(words)} characters: {words[:300]}"
        if on_purpose(error):
            return "refused"
        error = error.__cause__ if isinstance(error, Refused) else error
        return f"raised by chance: {type(error).__name__}: {words[:300]}{where(error)}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:300]}{where(error)}"
    return "built"


def last(error):
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename, trace.tb_lineno


def where(error):
    return " at {}:{}".format(*last(error))


def on_purpose(error):
    """Whether the error comes from a ``raise`` of ours, and not from Python or a library on our data."""
    if isinstance(error, Refused):
        return error.__cause__ is None or on_purpose(error.__cause__)  # without one, click has refused it
    if isinstance(error, OSError):
        return True
    file, line = last(error)
    return "nemo_dist" in file and linecache.getline(file, line).strip().startswith("raise ")


def build(rng, folder):
    return lambda: DistributedSetup.build(**keywords(rng)), (ValueError, TypeError, NemoDistError)


def from_dict(rng, folder):
    given, world = section(rng), rng.choice((4, 8, 8, 16, 48))
    return lambda: DistributedSetup.from_dict(given, world_size=world).to_dict(), (ValueError, TypeError, NemoDistError)


def from_yaml(rng, folder):
    file, world = folder / "recipe.yaml", rng.choice((4, 8, 8, 16, 48))
    file.write_bytes(text(rng))
    return lambda: DistributedSetup.from_yaml(file, world_size=world), (ValueError, TypeError, NemoDistError)


def command(rng, folder):
    file = folder / "recipe.yaml"
    file.write_bytes(text(rng))
    return invoked(arguments(rng, file))


def tools(rng, folder):
    """``search``, ``dry-run`` and ``train --dry-run``, which make models."""
    files = {name: folder / name for name in ("job.yaml", "text.txt", "config.json")}
    files["text.txt"].write_text(TEXT)
    files["job.yaml"].write_bytes(text(rng, job(rng, files["text.txt"])))
    config = (
        MODEL if rng.random() < 0.8 else plain({**MODEL, rng.choice((*MODEL, "architectures", "dtype")): junk(rng)})
    )
    files["config.json"].write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))
    return invoked(question(rng, files["job.yaml"], files["config.json"]))


def invoked(given):
    """Return a call of the command line with the arguments *given*."""
    from typer.testing import CliRunner

    from nemo_dist.cli.main import app

    def call():
        result = CliRunner().invoke(app, given)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise RuntimeError(f"{given}: {result.exception!r}") from result.exception
        if (
            result.exit_code not in (0, 2)
            or len(result.stderr) > LONGEST
            or (result.exit_code == 2) != bool(result.stderr)
        ):
            raise RuntimeError(f"{given} ended with {result.exit_code}: {result.stderr[:300]}")
        if result.exit_code:
            raise Refused(result.stderr) from refusal(result.exception)

    return call, (Refused,)


def refusal(error):
    """Return the error of ours that the command line made the exit *error* of; None for one that it found itself."""
    ended = error.__context__
    return ended.__context__ if type(ended).__name__ == "Exit" else None


def recipe(rng, folder):
    """What ``nemo-dist train`` does with a recipe before a rank starts."""
    from nemo_dist.recipe.config import Recipe
    from nemo_dist.recipe.job import judge

    (folder / "text.txt").write_text(TEXT)
    file, world = folder / "job.yaml", rng.choice((4, 8, 8, 16, 48))
    file.write_bytes(text(rng, job(rng, folder / "text.txt")))
    changes = [change(rng) for _ in range(rng.choice((0, 0, 1, 2)))]

    def call():
        asked = Recipe.from_yaml(file, changes)
        again = Recipe.from_json(asked.to_json())
        asked.setup(world)
        judge(asked)
        if repr(again) != repr(asked):  # with NaN, which equals nothing
            raise RuntimeError(f"the ranks are given another recipe: {again}, not {asked}")

    return call, (ValueError, TypeError, NemoDistError, OSError)


WAYS = {
    "build": build,
    "from_dict": from_dict,
    "from_yaml": from_yaml,
    "recipe": recipe,
    "command": command,
    "tools": tools,
}

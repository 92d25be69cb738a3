"""Write the skeleton of a package that adds a plugin: it installs, is listed, and passes its tests from the start."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from pathlib import Path
from string import Template

from nemo_dist.planning.validation import shown
from nemo_dist.plugin.registry import Registry, owner

_PROJECT = Template("""\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "$distribution"
version = "0.1"
description = "A plugin for nemo_dist"
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["nemo-dist>=0.1"]

[project.optional-dependencies]
test = ["nemo-dist[test]"]

# The name of the plugin, and its class. The class and its config say the same name.
[project.entry-points.nemo_dist]
$name = "$module:$title"

[tool.hatch.build]
dev-mode-dirs = ["."]

[tool.hatch.build.targets.wheel]
only-include = ["$module.py"]

[tool.pytest.ini_options]
testpaths = ["tests"]
""")

_README = Template("""\
# $distribution

A plugin for nemo_dist: say here what it does, with what it is proven, and what it refuses.

```
pip install $distribution
nemo-dist demo $use --nproc 2
```
""")

_PLUGIN = Template('''\
"""$title: say here what it does."""

import attrs

from nemo_dist import Stage, hookimpl


@attrs.frozen
class ${title}Config:
    """The options: plain values, as ranks compare their text."""

    plugin = "$name"


@attrs.frozen(eq=False)
class $title:
    """Do nothing yet."""

    name, config_type, stage = "$name", ${title}Config, Stage.COMPILE
    axes, composes_with = frozenset(), frozenset()

    config: ${title}Config = attrs.field(factory=${title}Config)

    @hookimpl
    def explain(self, plan):
        return f"$name: nothing to do yet, on {plan.world_size} ranks"
''')

_STRATEGY = Template('''\
"""$title: say here what it does."""

import attrs

from nemo_dist import Role, Stage, hookimpl


@attrs.frozen
class ${title}Config:
    """The options: plain values, as ranks compare their text."""

    plugin = "$name"


@attrs.frozen(eq=False)
class $title:
    """Replicate the model; average every gradient as it is made."""

    name, config_type, stage = "$name", ${title}Config, Stage.DATA
    axes, composes_with = frozenset({"dp_shard"}), frozenset()

    config: ${title}Config = attrs.field(factory=${title}Config)

    @hookimpl
    def wrap(self, parts, mesh):
        import torch.distributed as dist  # here, so that planning needs no torch

        group = mesh.group(Role.TOKENS)  # the ranks that see different tokens; None on one rank

        def average(parameter):
            if group is not None:
                dist.all_reduce(parameter.grad, group=group)
                parameter.grad /= group.size()

        for parameter in parts[0].parameters():
            parameter.register_post_accumulate_grad_hook(average)

    @hookimpl
    def explain(self, plan):
        return f"$name: {plan.size('dp')} replicas, one all-reduce for every gradient"
''')

_TESTS = Template('''\
"""$title keeps the contract of plugins, and trains like one process."""

from nemo_dist.testing import PluginConformance


class Test$title(PluginConformance):
    plugin = "$name"
''')


_IMPORTED = ("Role", "Stage")  # of the names in the skeletons, those that a class could take


def write(name: str, parent: Path, strategy: bool) -> Path:
    """Write the skeleton of the plugin *name* into a new folder in *parent*, and return that folder.

    With *strategy* it is a strategy that averages gradients, else a plugin that does nothing yet. Raises ValueError for
    a name that is no lower-case identifier or is taken, and where the folder is there already.
    """
    words = _words(name)
    folder = parent / words["distribution"]
    if folder.exists():
        raise ValueError(f"{folder} is there already; choose another name, or another folder with --into")
    words["use"] = f"--strategy {words['name']}" if strategy else f"--plugin {words['name']}"
    files = {
        "pyproject.toml": _PROJECT,
        "README.md": _README,
        f"{words['module']}.py": _STRATEGY if strategy else _PLUGIN,
        f"tests/test_{words['name']}.py": _TESTS,
    }
    for path, template in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(template.substitute(words))
    return folder


def _words(name: str) -> dict[str, str]:
    """Return the names of the plugin, its module, distribution and class."""
    plain = name.replace("-", "_")
    if not plain.isascii() or not plain.isidentifier() or plain != plain.lower() or keyword.iskeyword(plain):
        raise ValueError(f"a plugin's name must be a lower-case identifier, like token_meter (got {shown(name)})")
    title = "".join(word.capitalize() for word in plain.split("_"))
    if not title.isidentifier() or keyword.iskeyword(title) or title in _IMPORTED:
        why = "which the skeleton imports" if title in _IMPORTED else "which is no name in Python"
        raise ValueError(f"the class of plugin {plain!r} would be called {title!r}, {why}; choose another name")
    registry = Registry()
    taken: Mapping[str, str] = {entry.name: owner(entry) for entry in (*registry.entries, *registry.aliases)}
    if plain in taken:
        raise ValueError(f"plugin {plain!r} is installed already, from {taken[plain]}; choose another name")
    return {
        "name": plain,
        "module": f"nemo_dist_{plain}",
        "distribution": f"nemo-dist-{plain.replace('_', '-').strip('-')}",
        "title": title,
    }

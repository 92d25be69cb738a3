"""The page of the contract says what the code has: every hook, every field, every attribute, and nothing else."""

import re
from pathlib import Path

import attrs

from nemo_dist import Plugin, PluginState, RuntimePart, SavedState, hookimpl
from nemo_dist.plugin import contract, protocol
from nemo_dist.plugin.hook_caller import HOOKS, acts, arguments_of
from nemo_dist.plugin.registry import OFF

PAGE = (Path(__file__).parents[1] / "docs" / "hooks.md").read_text()


def section(title):
    """Return the text of the section called *title*."""
    return re.split(r"^## ", PAGE.split(f"## {title}\n")[1], flags=re.M)[0]


def rows(text):
    """Return the cells of every row of the tables in *text*, by the name in its first cell."""
    found = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells[1:] for cells in found}


def test_every_hook_is_there_with_its_arguments_and_what_it_must_not_do():
    heads = re.findall(r"^### `(\w+)\((.*?)\)`\n(.*?)(?=^##|\Z)", PAGE, flags=re.M | re.S)

    assert {name: arguments.split(", ") for name, arguments, _ in heads} == {name: arguments_of(name) for name in HOOKS}
    for name, _, text in heads:
        assert re.findall(r"\*\*(.*?):\*\*", text) == ["When", "Returns", "Must not"], name


def test_hooks_of_planning_alone_do_not_act_on_a_run():
    planning = re.findall(r"^### `(\w+)\(", section("Hooks of planning"), flags=re.M)

    for name in HOOKS:
        only = type("Only", (), {name: hookimpl(lambda self: None)})
        assert acts(only) is (name not in planning), name


def test_every_attribute_of_the_class_is_there_with_what_it_is_without():
    found = rows(section("Attributes of the class"))
    required = {*Plugin.__annotations__, "config"}

    assert found.keys() == required | protocol._OPTIONAL.keys()
    assert {name for name, cells in found.items() if cells[1] == "required"} == required
    for name, usual in protocol._OPTIONAL.items():
        assert found[name][1] == ("none" if usual == {} else f"`{usual}`"), name


def test_every_field_is_there():
    def names(kind):
        return {field.name for field in attrs.fields(kind)}

    assert rows(section("Fields of `RuntimePart`")).keys() == names(RuntimePart)
    state, saved = section("State in checkpoints").split("`SavedState` has the same:")
    assert rows(state).keys() == names(PluginState) and rows(saved).keys() == names(SavedState)


def test_the_page_is_that_of_this_version():
    assert PAGE.startswith(f"# The contract of plugins, version {contract.CONTRACT}\n")
    assert f"{OFF}=" in section("Turn a plugin off")

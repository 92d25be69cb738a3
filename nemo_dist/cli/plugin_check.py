"""Run the conformance kit on an installed plugin, as pytest runs it in the tests of that plugin."""

from __future__ import annotations

import keyword
import math
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from nemo_dist.errors import UnknownNameError
from nemo_dist.planning.validation import near, shown
from nemo_dist.plugin.registry import Registry

_TESTS = """
from nemo_dist.testing import PluginConformance


class Test(PluginConformance):
    plugin = {name!r}
    specimen = {model!r}
    bound = {bound!r}
"""


def check(name: str, model: str, law: str = "", bound: float | None = None) -> int:
    """Run the kit on the plugin *name* with the tiny *model*, print what pytest prints, and return its exit code.

    *law*: only the tests with that in their names. *bound*: of a plugin that is inexact by design. Raises
    UnknownNameError or PluginError for a plugin that cannot be used, and for a *law* that no test has in its name,
    ValueError where pytest is not installed and for a *bound* that is none.
    """
    if bound is not None and not 0 < bound < math.inf:
        raise ValueError(f"--bound must be a finite number above 0, the largest relative error (got {bound})")
    registry = Registry()
    registry.load(name)
    if missing := [needed for needed in ("pytest", "hypothesis") if find_spec(needed) is None]:
        raise ValueError(f"the kit needs {' and '.join(missing)}; pip install 'nemo-dist[test]'")
    from nemo_dist.testing.tiny_models import SPECIMENS

    if model not in SPECIMENS:
        raise UnknownNameError(f"there is no tiny model {shown(model)}{near(model, SPECIMENS)}: {', '.join(SPECIMENS)}")
    _refuse_law(law)
    with tempfile.TemporaryDirectory() as folder:
        text = _TESTS.format(name=registry.spelled(name), model=model, bound=bound)
        (Path(folder) / "test_kit.py").write_text(text)
        command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", "--rootdir", folder]
        return subprocess.run([*command, "-k", law, "test_kit.py"], cwd=folder, check=False).returncode


def _refuse_law(law: str) -> None:
    """Raise UnknownNameError for a text that no test of the kit has in its name."""
    from nemo_dist.testing import PluginConformance

    names = [name.removeprefix("test_") for name in dir(PluginConformance) if name.startswith("test_")]
    # What pytest takes for an expression is no part of a name, but "not" is one of some.
    if law and (keyword.iskeyword(law) or not any(law in f"test_{name}" for name in names)):
        raise UnknownNameError(
            f"no test of the kit has {shown(law)} in its name{near(law, names)}; the names: {', '.join(names)}"
        )

"""Run the conformance kit on an installed plugin, as pytest runs it in the tests of that plugin."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from nemo_dist.plugin.registry import Registry

_TESTS = """
from nemo_dist.testing import PluginConformance


class Test(PluginConformance):
    plugin = {name!r}
    specimen = {model!r}
"""


def check(name: str, model: str) -> int:
    """Run the kit on the plugin *name* with the tiny *model*, print what pytest prints, and return its exit code.

    Raises UnknownNameError or PluginError for a plugin that cannot be used, ValueError where pytest is not installed.
    """
    registry = Registry()
    registry.load(name)
    if missing := [needed for needed in ("pytest", "hypothesis") if find_spec(needed) is None]:
        raise ValueError(f"the kit needs {' and '.join(missing)}; pip install 'nemo-dist[test]'")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_kit.py").write_text(_TESTS.format(name=registry.spelled(name), model=model))
        command = [sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider", "--rootdir", folder]
        return subprocess.run([*command, "test_kit.py"], cwd=folder, check=False).returncode

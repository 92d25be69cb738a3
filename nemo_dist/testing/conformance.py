"""The conformance kit: the laws that every plugin keeps, ours and third-party ones alike.

Three lines in a test module run it; the ranks come from the ``ranks`` fixture of nemo_dist's pytest plugin::

    from nemo_dist.testing import PluginConformance

    class TestMine(PluginConformance):
        plugin = "mine"

Each test holds one law of ``nemo_dist.testing.laws``. A failure names the law, the numbers and where to look.
"""

from __future__ import annotations

from nemo_dist.testing.checkpoint_laws import CheckpointLaws
from nemo_dist.testing.loop_laws import LoopLaws
from nemo_dist.testing.planning_laws import PlanningLaws
from nemo_dist.testing.training_laws import TrainingLaws


class PluginConformance(PlanningLaws, TrainingLaws, LoopLaws, CheckpointLaws):
    """The conformance tests: subclass it in a test module and set ``plugin`` to the plugin's registered name.

    ``build`` are the keywords of ``DistributedSetup.build`` that select the plugin on ``world`` ranks, with all
    computation in float32; by default those of ``nemo_dist.testing.selecting.smallest``. ``specimen`` names the model
    of ``nemo_dist.testing.tiny_models`` to train. ``bound``: for a plugin with ``exact = False``, the relative error
    that it keeps; or ``alone = True`` for one that is compared with itself on one rank, and not with plain
    transformers. ``frozen``: prefixes of parameters that the plugin itself freezes.
    """

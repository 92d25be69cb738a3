"""Run the command ``nemo-dist`` as ``python -m nemo_dist.cli``."""

from nemo_dist.cli.main import main

main()

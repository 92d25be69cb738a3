"""``python -m nemo_dist.cli`` is the command ``nemo-dist``."""

from nemo_dist.cli.main import main

main()

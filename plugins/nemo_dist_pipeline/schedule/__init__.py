"""Which stage runs which microbatch when: whole numbers, no torch."""

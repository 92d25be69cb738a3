"""Plan which stage runs which microbatch when: integers only, no torch."""

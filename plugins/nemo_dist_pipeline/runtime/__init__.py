"""Run the stages: torch's schedules, microbatches, evaluation, adapters, and the weight that two stages share."""

"""Run the stages: torch's schedules, microbatches, evaluation, and the weight that two stages share."""

"""Real models trained on real data, one run for each task: python -m bench demos."""

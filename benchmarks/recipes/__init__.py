"""Published checkpoints, steered with the published settings: `python -m benchmarks.recipes`."""

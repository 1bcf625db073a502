"""Steering without gradients beside the guidance that differentiates, on the zoo's networks: `python -m benchmarks.steering`."""

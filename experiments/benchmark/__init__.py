"""What a network costs, beside what one would take instead: `python -m experiments.benchmark`."""

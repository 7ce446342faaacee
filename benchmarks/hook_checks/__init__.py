"""The checks of `benchmarks/hook_features.py`: each is a few lines of real code that a user would write."""

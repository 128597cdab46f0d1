"""Making models smaller; today the part that only counts: what a configuration costs (`cost.py`)."""

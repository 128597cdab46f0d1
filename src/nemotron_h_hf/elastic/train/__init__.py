"""Trains a parent with the models nested in it: the router, what it may choose, what that costs."""

"""Nested models in one parent: masks, cutting, sharing one memory image, training."""

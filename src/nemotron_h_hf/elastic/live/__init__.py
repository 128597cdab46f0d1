"""A parent and its nested models in one memory image: laid out, run and saved."""

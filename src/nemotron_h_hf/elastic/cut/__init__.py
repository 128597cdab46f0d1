"""Cuts one nested model out of the files of its parent."""

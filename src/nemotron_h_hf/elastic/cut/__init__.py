"""Cuts one nested model out of the files of its parent.

cutting.py          a child as an ordinary checkpoint, with a manifest
other_readers.py    the nearest budget that other readers can express
"""

"""Smaller models inside one parent: named by budgets, cut out, shared or trained together.

budgets.py        the smaller models that a parent's configuration names
child.py          one budget resolved: configuration, layers and indices
resolve.py        a child by name, sizes, fraction or memory
search.py         what fits a fraction or a memory limit, best first
child_files.py    reads a child from its parent's files
attach.py         adds `from_pretrained(..., budget=)` to the model classes
vision.py         children of a vision-language parent
masks.py          the parent computes what a child would

prepare/ makes a parent, live/ runs it with its children, train/ trains them together, cut/ writes one child as a checkpoint.
"""

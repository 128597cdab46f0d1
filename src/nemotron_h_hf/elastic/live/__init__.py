"""A parent and its nested models in one memory image: laid out, run and saved.

parent.py            NemotronHElasticForCausalLM and its submodels
prefix_order.py      the order of the weights in memory, in which each budget is a prefix
ordered_linear.py    a Linear with its weight in that order
tied_tensors.py      the tensors of a submodel: views where possible, otherwise copies
generating.py        a budget per call or row, and schedules
cache_carry.py       one nested model's cache in the shape of another's
vision.py            NemotronHElasticForConditionalGeneration: a parent that sees
saving.py            back to an ordinary checkpoint
"""

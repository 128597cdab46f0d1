"""One module per `nemotron-h` command, each with `main(argv)`; no script imports another.

demo.py        generate.py  serve.py  info.py  push.py  bench.py  eval.py
convert.py
elasticize.py  slice.py  elastic_train.py  minipuzzle.py
blend.py       pretrain.py  sft.py  distill.py
merge.py       export.py  plot.py
make_vl.py
"""

"""MiniPuzzle: from a model to a smaller one under a memory budget (arXiv 2504.03624), in stages that leave files.

arguments.py       flags and YAML keys
pipeline.py        the stages in their order
run.py             what stages share, and what each is made from
stage_files.py     a stage's file: whole, not made twice, refused if made from something else
text.py            rows to score and rank on, files to distil on
memory_image.py    the teacher in memory, every candidate a view of it
scoring.py         scores.json
searching.py       candidates.json
ranking.py         ranked.json, with controls
benchmarks.py      benchmarked.json
tournament.py      tournament.json
student.py         student.json, and the student's folder
distilling.py      nemotron-h distill as a step
family.py          the finalists as budgets of an elastic parent
report.py          report.html, and the same as Markdown
report_plots.py    their pictures

What is measured and counted, without files and trainings, is in ../compression.
"""

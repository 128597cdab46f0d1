"""Training: transformers' Trainer with our data, losses and optimizers. It is handed a model.

arguments.py         flags and YAML
data_arguments.py    the flags of the data
rows.py              the rows of a run, of any command
starting_point.py    the model and tokenizer that the flags name
trainer.py           NemotronHTrainer: schedule by tokens, exact resume, safe checkpoints
checkpoints.py       which checkpoint folders are whole
monitor.py           progress bar and metrics.jsonl
held_out_loss.py     the held-out loss of a run
trained_folder.py    the trained weights or adapters as a folder, and where it is pushed
one_copy.py          one copy of the weights in host memory under FSDP2
optimizer.py         AdamW, or torch's Muon for the matrices inside the layers
schedule.py          warm-up, stable, decay, over tokens
z_loss.py            next-token loss with a z-loss
losses.py            distillation loss in chunks
distillation.py      the trainer that learns from a teacher
teacher_cache.py     a teacher's largest logits on disk
vision.py            which parts of a vision-language model are trained
fp8.py               the paper's FP8 recipe
adapters.py          LoRA and QLoRA
"""

"""Training text: where documents come from and how they become batches.

sources.py               local files or a hub data set, in a seeded order that can be resumed
readers.py               text, JSON lines, parquet and data set shards
index.py                 where each record is in a local source
sortedness.py            whether records are in sorted order
bad_data.py              records that cannot be used: reported, counted, or fatal
phases.py                weights that change during a run
blend.py                 documents from several sources in the weights of each phase
documents.py             the form in which documents reach packing
packing.py               documents into full rows, kept apart
packed_text.py           rows of one length out of plain texts
chat.py                  conversations to tokens, with a loss on the assistant
fine_tuning_records.py   fine-tuning records to tokens and labels
blended_rows.py          rows for fine-tuning and distillation
pictures.py              fine-tuning records with pictures
long_conversations.py    long conversations from short ones
stdlib_text.py           the standard library as text
byte_bpe.py              a tokenizer trained on a text
"""

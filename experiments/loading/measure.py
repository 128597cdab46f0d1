"""How many tokens per second of one core a run's rows come at: from texts, and from token ids made before.

    python experiments/loading/measure.py

Texts are the standard library's sources, the tokenizer is the small one in the package; rows of 4,096 tokens through a blend
of one source, as `nemotron-h pretrain` reads them. Writes loading.json. Every process of a run reads all rows (the blend's
proportions depend on every document's length), so this is the ceiling of the whole run.
"""

import json
import os
import platform
import tempfile
import time
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
from transformers import AutoTokenizer

from nemotron_h_hf import EMBEDDED_MODEL
from nemotron_h_hf.data.blend import Blend
from nemotron_h_hf.data.documents import document_encoder
from nemotron_h_hf.data.packing import SplitRows
from nemotron_h_hf.data.phases import Phase
from nemotron_h_hf.data.sources import Source
from nemotron_h_hf.data.stdlib_text import read_documents
from nemotron_h_hf.whole_files import write_json

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "loading"

NUM_DOCUMENTS, LENGTH, NUM_ROWS = 400, 4096, 300


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encode = document_encoder(AutoTokenizer.from_pretrained(EMBEDDED_MODEL))
    texts = [document.text for document in read_documents()[:NUM_DOCUMENTS]]
    with tempfile.TemporaryDirectory() as folder:
        columns = {"text": texts, "input_ids": [encode(text) for text in texts]}
        sources = {}
        for column, values in columns.items():
            sources[f"{column}, JSONL"] = Path(folder, f"{column}.jsonl")
            sources[f"{column}, JSONL"].write_text("".join(json.dumps({column: value}) + "\n" for value in values))
            sources[f"{column}, parquet"] = Path(folder, f"{column}.parquet")
            pyarrow.parquet.write_table(pyarrow.table({column: values}), sources[f"{column}, parquet"])
        found = {name: tokens_per_second(path, encode) for name, path in sources.items()}
    report = {
        "command": "python experiments/loading/measure.py", "cpu": platform.machine(), "rows": NUM_ROWS, "row_tokens": LENGTH,
        "tokens_per_cpu_second": found,
    }  # fmt: skip
    write_json(RESULTS / "loading.json", report)
    print(json.dumps(report, indent=1))


def tokens_per_second(path: Path, encode) -> int:
    source = Source("data", path=str(path), column=path.stem)
    rows = SplitRows(Blend([source], [Phase({"data": 1.0})], encode, NUM_ROWS * LENGTH), LENGTH)
    started = time.process_time()
    count = sum(len(row["input_ids"]) for row in islice(rows, NUM_ROWS))
    return round(count / (time.process_time() - started))


if __name__ == "__main__":
    main()

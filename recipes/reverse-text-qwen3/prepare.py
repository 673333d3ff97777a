"""Writes reverse-text.jsonl beside this file: each text with its reversal.

`python recipes/reverse-text-qwen3/prepare.py`; needs datasets and the hub.
"""

import json
from pathlib import Path

from datasets import load_dataset

TARGET = Path(__file__).with_name("reverse-text.jsonl")

if __name__ == "__main__":
    texts = [row["prompt"] for row in load_dataset("PrimeIntellect/Reverse-Text-RL", split="train")]
    rows = [json.dumps({"prompt": text, "answer": text[::-1]}) for text in texts]
    TARGET.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{TARGET}: {len(rows)} problems")

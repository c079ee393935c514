"""Text for models: tokenizers, rows of JSONL as token ids and labels, batches, and scores.  specs/data.md."""

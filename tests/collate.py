"""Batches of language-model inputs by hand: a second implementation of what the cache reader collates."""

import hashlib

import torch


def collate(*rows, length=None, seed=0):
    """Pad rows, each a list of tokens or a list of packed documents; every token that has a successor is a target."""
    rows = [row if isinstance(row[0], list) else [row] for row in rows]
    length = length or max(sum(map(len, row)) for row in rows)
    batch = {k: torch.zeros(len(rows), length, dtype=torch.long) for k in ("input_ids", "position_ids", "labels")}
    batch |= {k: torch.zeros(len(rows), length, dtype=torch.bool) for k in ("target", "valid")}
    for r, documents in enumerate(rows):
        start = 0
        for document in documents:
            stop = start + len(document)
            batch["input_ids"][r, start:stop] = torch.tensor(document)
            batch["position_ids"][r, start:stop] = torch.arange(len(document))
            batch["labels"][r, start : stop - 1] = torch.tensor(document[1:])
            batch["target"][r, start : stop - 1] = True
            batch["valid"][r, start:stop] = True
            start = stop
    keys = [hashlib.sha256(f"row{seed}.{r}".encode()).digest()[:8] for r in range(len(rows))]
    batch["row_key"] = torch.tensor([int.from_bytes(k, "little", signed=True) for k in keys])
    return batch

"""A layer's attention that has run, with queries and keys of random numbers, for oracles."""

import torch


class Heads:
    """All of them are here."""

    def __init__(self, heads):
        self.heads = heads

    def mean(self, scores, query):
        return scores

    def are_spread(self, query):
        return False


class Layer:
    """queries [B, Hq, S, D], keys [B, Hkv, S, D]."""

    scale = 0.5

    def __init__(self, queries, keys):
        self.all_queries, self.all_keys = queries, keys

    def heads(self, query):
        return Heads(query.shape[1])

    def queries(self, rows, rotary=True):
        return self.all_queries[:, :, rows]

    def keys(self, past):
        return self.all_keys


def observed(rng, batch, rows, heads=4, key_heads=2, channels=8):
    queries, keys = (
        torch.from_numpy(rng.standard_normal((batch, n, rows, channels))).float()
        for n in (heads, key_heads)
    )
    return Layer(queries, keys)

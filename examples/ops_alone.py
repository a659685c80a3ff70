"""The ops in model code of one's own: no transformers, no hooks, nothing but torch.

    python examples/ops_alone.py

One layer of a decoder in a few lines. Between two layers, the visual tokens that the last row
attends to least leave its hidden states and its KV cache.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

import vtp_kernels as vtp

BATCH, TOKENS, HEADS, DIM = 2, 80, 4, 32
VISUAL = slice(8, 72)  # where the picture stands in the prompt
KEEP = 16  # of its 64 tokens

torch.manual_seed(0)
hidden = torch.randn(BATCH, TOKENS, HEADS * DIM)
weight = torch.randn(3, HEADS * DIM, HEADS * DIM) / (HEADS * DIM) ** 0.5


def attention(hidden):
    """What the layer puts out, and its queries, keys and values, [batch, heads, tokens, dim]."""
    q, k, v = (
        (hidden @ w).unflatten(-1, (HEADS, DIM)).transpose(1, 2).contiguous() for w in weight
    )
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
    return hidden + mixed.transpose(1, 2).flatten(2), (q, k, v)


hidden, (q, k, v) = attention(hidden)

# The last row's attention to each visual key, without an attention matrix; of these the best,
# and all of the text.
visual = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
visual[:, VISUAL] = True
scores = vtp.attention_scores(q[:, :, -1:], k, candidates=visual)
width = TOKENS - int(visual[0].sum()) + KEEP
kept = vtp.select_topk(scores, KEEP, candidates=visual, keep=~visual, capacity=width)

# The other rows leave; those that stay keep their order.
(hidden,) = vtp.compact_rows([hidden], kept.indices)
(k,), (v,) = vtp.compact_kv([k], [v], kept.indices)
hidden, _ = attention(hidden)

print(f"rows in the second layer: {hidden.shape[1]} of {TOKENS}")
print(f"keys in the first layer's cache: {k.shape[2]} of {TOKENS}")

"""A plain model with the weights that adapters or quantised modules stand for, and what it says."""

import torch
from tiny_llava import batch, prompt, tiny_llava
from torch import nn

import vtp_kernels as vtp

# One of each kind: layers are observed; visual tokens are passive, or skip attention; batches come
# packed; what a layer put out is looked at alone.
KINDS = ("fastv", "visipruner", "visipruner that skips", "inflection with padding", "lvpruning")
SETTINGS = {
    "max_new_tokens": 3,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def prompts():
    return batch(prompt(1, 9, 0), prompt(2, 3, 1), prompt(0, 5, 3))


def plain_like(model, weight_of, **settings):
    """A tiny LLaVA with the weights `weight_of(module)` [out, in] of those of the other's modules
    that stand for a linear one."""
    plain = tiny_llava(**settings)
    for name, module in plain.named_modules():
        other = model.get_submodule(name)
        if type(module) is nn.Linear and type(other) is not nn.Linear:
            with torch.no_grad():
                module.weight.copy_(weight_of(other))
    return plain


@torch.no_grad()
def seen_through(linear):
    """[out, in]: what a module without a bias makes of every input by itself."""
    return linear(torch.eye(linear.in_features)).T


@torch.no_grad()
def gathered(model, inputs, kept, cache=None, tokens=()):
    """Logits [1, 1, V] of the prompt's last row, and then of each further token, where rows are
    taken out by hand: those of one prompt that are not in `kept` {layer: bool [1, S]}.

    Where rows are rounded by scales that many share, no mask can do the same as taking them out.
    """
    text = model.model.language_model
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    hidden = text.embed_tokens(inputs["input_ids"])
    hidden[inputs["input_ids"] == model.config.image_token_id] = torch.cat(tuple(features))
    here, logits = torch.arange(hidden.shape[1]), []
    for step in range(1 + len(tokens)):
        if step:
            hidden = text.embed_tokens(torch.tensor([[tokens[step - 1]]]))
            here = torch.tensor([inputs["input_ids"].shape[1] + step - 1])
        for index, layer in enumerate(text.layers):
            if index in kept and not step:
                stays = kept[index][0][here]
                hidden, here = hidden[:, stays], here[stays]
            embeddings = text.rotary_emb(hidden, position_ids=here[None])
            hidden = layer(
                hidden,
                position_embeddings=embeddings,
                attention_mask=None,
                past_key_values=cache,
            )
        logits.append(model.lm_head(text.norm(hidden)[:, -1:]))
    return logits


def answers(top, applied_to, method):
    """What a model says in generate() and in a plain call, and what was kept."""
    inputs = prompts()
    with vtp.prune(applied_to, method) as run:
        output = top.generate(**inputs, **SETTINGS)
        kept = run.report().kept
        with torch.no_grad():
            logits = top(**inputs, logits_to_keep=2).logits
    return output, logits, kept


def assert_same_answers(some, others, atol=1e-4):
    (output, logits, kept), (expected, expected_logits, expected_kept) = some, others
    assert kept.keys() == expected_kept.keys() and kept
    for layer in kept:
        assert torch.equal(kept[layer], expected_kept[layer])
    assert torch.equal(output.sequences, expected.sequences)
    for a, b in zip(output.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=atol)


def differ(some, others):
    return not torch.allclose(some[1], others[1], atol=1e-2)

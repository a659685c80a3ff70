"""Small models with random weights, the same in vLLM and in transformers."""

import asking
import plain_tiles
import torch
from tiny_next import drawing

import vtp_kernels as vtp

METHODS = {  # by what a budget scores by: the same choice in transformers
    "attention": lambda keep: vtp.VisPruner(keep, important=1.0, per="picture"),
    "divprune": lambda keep: vtp.DivPrune(keep, per="picture"),
}


class InBoth:
    """tiny: what makes the model, and its pictures. model: in transformers. engine: vLLM's."""

    def pictures(self, first=0, last=None):
        return [drawing(size, seed) for seed, size in enumerate(self.tiny.SIZES)][first:last]

    def request(self, pictures, text="7 8", **more):
        return plain_tiles.request(self.tiny, pictures, text) | more

    def answer(self, inputs, method, positions="original"):
        """Of transformers: tokens, and the logarithms of their probabilities."""
        with vtp.prune(self.model, method, positions=positions):
            found = self.model.generate(
                **inputs,
                max_new_tokens=asking.LONGEST_ANSWER,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        new = found.sequences[0, -len(found.logits) :].tolist()
        steps = zip(new, found.logits, strict=True)
        return new, [x.log_softmax(-1)[0, token].item() for token, x in steps]


def assert_no_entry_is_shared(served, budgets):
    """Two pictures, with every budget: alone, together in one batch, and from what is cached."""
    requests = [served.request(served.pictures(0, 2), **budget) for budget in budgets]
    alone = []
    for request in requests:
        asking.forget(served.engine)
        alone += asking.ask(served.engine, [request])
    asking.forget(served.engine)
    for _ in range(2):
        together = asking.ask(served.engine, requests)
        for output, expected in zip(together, alone, strict=True):
            assert_same(output, (asking.tokens(expected), asking.logprobs(expected)))
    assert len({tuple(asking.logprobs(output)) for output in alone}) == len(budgets)


def assert_same(output, expected):
    """vLLM's output, and an answer with the logarithms of its tokens' probabilities."""
    tokens, steps = expected
    assert asking.tokens(output) == tokens
    difference = torch.tensor(asking.logprobs(output)) - torch.tensor(steps)
    assert difference.abs().max() < 1e-4

"""Small models with random weights, the same in vLLM and in transformers."""

import importlib

import asking
import plain_tiles
import torch
from safetensors.torch import load_file, save_file
from tiny_next import drawing
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor

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


class Tiles(InBoth):
    """A model that cuts pictures up: LLaVA-OneVision, InternVL."""

    def __init__(self, module, folder, **settings):
        self.tiny, self.folder = importlib.import_module(module), folder
        self.model = self.tiny.new_model()
        self.tiny.save(self.model, folder)
        self.engine = asking.llm(folder, **settings)
        self.processor = self.engine.llm_engine.renderer.get_mm_processor()

    def processed(self, pictures, text="7 8", **more):
        """What vLLM makes of a prompt: tokens, and what the model is given of its pictures."""
        items = self.processor.info.parse_mm_data({"image": pictures})
        prompt = self.request(pictures, text)["prompt"]
        given = more.get("mm_processor_kwargs")
        made = self.processor(prompt, items, hf_processor_mm_kwargs=given)
        return made["prompt_token_ids"], made["mm_kwargs"].get_data()

    def embedded(self, kwargs):
        """What the model in vLLM makes of one picture."""
        with torch.inference_mode():
            found = self.engine.apply_model(lambda model: model.embed_multimodal(**kwargs))[0]
        (rows,) = found
        return rows

    def inputs(self, pictures, text="7 8"):
        """The same for transformers: tokens, and pictures as its model wants them."""
        tokens, given = self.processed(pictures, text)
        pixels = given["pixel_values_flat" if "pixel_values_flat" in given else "pixel_values"]
        if isinstance(pixels, list):  # of LLaVA-OneVision, pictures with unlike numbers of crops
            pixels = pad_sequence(pixels, batch_first=True)
        found = {"pixel_values": pixels}
        if "image_sizes" in given:
            found["image_sizes"] = given["image_sizes"]
        return torch.tensor([tokens]), found

    def in_transformers(self, pictures, method, text="7 8", positions="contiguous"):
        """Tokens, and the logarithms of their probabilities."""
        ids, given = self.inputs(pictures, text)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}
        return self.answer(inputs, method, positions)


class Grids(InBoth):
    """A model with M-RoPE."""

    def __init__(self, name, folder, **settings):
        import tiny_grids

        self.name, self.tiny, self.folder = name, tiny_grids.FAMILIES[name], folder
        self.model = self.tiny.new_model()
        self.model.save_pretrained(folder)
        if name == "qwen3_vl_moe":
            turn_experts(folder / "model.safetensors")
        self.tiny.new_processor().save_pretrained(folder)
        self.processor = AutoProcessor.from_pretrained(folder)
        self.engine = asking.llm(folder, **settings)

    def in_transformers(self, pictures, method, text="7 8"):
        """Tokens, and the logarithms of their probabilities."""
        prompt = self.request(pictures, text)["prompt"]
        inputs = self.processor(text=[prompt], images=pictures, return_tensors="pt")
        return self.answer(inputs, method)


def turn_experts(path):
    """As released, and as vLLM reads them; transformers 5 has them the other way round."""
    weights = {
        name: x.transpose(1, 2).contiguous() if ".experts." in name else x
        for name, x in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


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

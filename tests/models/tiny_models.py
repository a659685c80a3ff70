"""The small model with random weights of every supported family, and prompts for it."""

from dataclasses import dataclass

import torch

from vtp_kernels.models.families import FAMILIES as PAGES
from vtp_kernels.models.families.tiny import IMAGE, VIDEO, Tiny

__all__ = ["FAMILIES", "VIDEO", "TinyFamily", "words"]


@dataclass(frozen=True)
class TinyFamily:
    tiny: Tiny

    @property
    def make(self):
        return self.tiny.make

    @property
    def picture(self):
        return self.tiny.picture

    @property
    def types(self):
        return self.tiny.types

    def model(self, attention, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        model = self.make().eval().to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.12)
        model.set_attn_implementation(attention)
        model.generation_config.eos_token_id = None  # every case runs to its full length
        model.generation_config.pad_token_id = 0
        return model

    def batch(self, model, *prompts, seed=0):
        """Left-padded inputs: a prompt is (pictures, words of text), the pictures as their indices.

        Each prompt has <bos> and some text, then per picture its placeholders and a word.
        """
        generator = torch.Generator().manual_seed(seed)
        rows, pictures = [], []
        for indices, text in prompts:
            parts = [torch.tensor([1]), words(3, generator)]
            for index in indices:
                pictures.append(self.picture(generator, index))
                placeholders = torch.full((self.tokens(model, pictures[-1]),), IMAGE)
                parts += [placeholders, words(2, generator)]
            rows.append(torch.cat([*parts, words(text, generator)]))
        width = max(map(len, rows))
        pads = [width - len(row) for row in rows]
        pad = torch.nn.functional.pad
        inputs = {
            "input_ids": torch.stack([pad(r, (n, 0)) for r, n in zip(rows, pads, strict=True)]),
            "attention_mask": torch.stack([(torch.arange(width) >= n).long() for n in pads]),
        }
        if self.types:
            inputs[self.types] = (inputs["input_ids"] == IMAGE).int()
        for name in pictures[0] if pictures else ():
            inputs[name] = torch.cat([picture[name] for picture in pictures]).to(
                model.dtype if name == "pixel_values" else torch.long
            )
        return inputs

    @staticmethod
    @torch.no_grad()
    def tokens(model, picture):
        """How many visual tokens the model makes of a picture."""
        pixels = {"pixel_values": picture["pixel_values"].to(model.dtype)}
        features = model.get_image_features(**picture | pixels, return_dict=True).pooler_output
        return sum(len(part) for part in features)


def words(count, generator):
    """Ids of words leave out those that mean something."""
    return torch.randint(3, 96, (count,), generator=generator)


FAMILIES = {name: TinyFamily(tiny) for page in PAGES.values() for name, tiny in page.tiny().items()}

"""The small model with random weights of every supported family, and prompts for it."""

from dataclasses import dataclass

import torch
import transformers

from vtp_kernels.models.families import FAMILIES as PAGES
from vtp_kernels.models.families import Family, parts_of
from vtp_kernels.models.families.tiny import IMAGE, VIDEO, Tiny

__all__ = ["ALL", "FAMILIES", "LINEAR", "VIDEO", "TinyFamily", "windows", "words"]


@dataclass(frozen=True)
class TinyFamily:
    page: Family
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

    def refuses_passive(self, model, layers):
        """Whether visual tokens cannot be passive in the first `layers` of the model."""
        return self.page.sees_ahead or any(windows(model)[:layers])

    def batch(self, model, *prompts, seed=0):
        """Left-padded inputs: a prompt is (pictures, words of text), the pictures as their indices,
        and videos as (index,).

        Each prompt has <bos> and some text, then per picture its placeholders and a word.
        """
        return self.inputs(model, *self.draw(model, *prompts, seed=seed))

    def draw(self, model, *prompts, seed=0):
        """Of each such prompt its ids, and what the model is given of its pictures."""
        generator = torch.Generator().manual_seed(seed)
        drawn = []
        for indices, text in prompts:
            parts, pictures = [torch.tensor([1]), words(3, generator)], []
            for index in indices:
                make = self.tiny.video.make if isinstance(index, tuple) else self.picture
                number = index[0] if isinstance(index, tuple) else index
                pictures.append(make(generator, number))
                parts += [self.placeholders(model, pictures[-1]), words(2, generator)]
            drawn.append((torch.cat([*parts, words(text, generator)]), pictures))
        return drawn

    def inputs(self, model, *drawn):
        """Left-padded inputs of prompts that were drawn."""
        pad = torch.nn.functional.pad
        width = max(len(ids) for ids, _ in drawn)
        pads = [width - len(ids) for ids, _ in drawn]
        inputs = {
            "input_ids": torch.stack(
                [pad(ids, (n, 0)) for (ids, _), n in zip(drawn, pads, strict=True)]
            ),
            "attention_mask": torch.stack([(torch.arange(width) >= n).long() for n in pads]),
        }
        ids = inputs["input_ids"]
        for name in self.types:
            inputs[name] = ((ids == IMAGE) * self.tiny.type_of_picture + 2 * (ids == VIDEO)).int()
        if self.tiny.video:
            ids[ids == VIDEO] = self.tiny.video.token
        pictures = [picture for _, shown in drawn for picture in shown]
        for name in {name: None for picture in pictures for name in picture}:
            side_by_side = self.tiny.side_by_side and name.startswith("pixel_values")
            given = [picture[name] for picture in pictures if name in picture]
            given = torch.cat(given, dim=-1 if side_by_side else 0)
            inputs[name] = given.to(model.dtype) if given.is_floating_point() else given
        return inputs

    def placeholders(self, model, picture):
        """With what stands between and around the frames of a video."""
        if "pixel_values" in picture:
            around = self.tiny.around
            shown = [IMAGE] * self.tokens(model, picture)
            return torch.tensor([*around[:1], *shown, *around[1:]])
        video, total = self.tiny.video, self.tokens(model, picture)
        frames = 1
        if video.before:
            sizes = picture.get("target_sizes_videos")
            frames = int(picture["video_grid_thw"][0, 0]) if sizes is None else len(sizes)
        frame = [*video.before, *[VIDEO] * (total // frames), *video.after]
        return torch.tensor([*video.around[:1], *frame * frames, *video.around[1:]])

    @staticmethod
    @torch.no_grad()
    def tokens(model, picture):
        """How many visual tokens the model makes of a picture or a video."""
        given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in picture.items()}
        method = f"get_{'image' if 'pixel_values' in picture else 'video'}_features"
        encode = getattr(model, method, None) or getattr(model.model, method)
        output = encode(**given, return_dict=True)
        features = output.pooler_output
        if features is None:  # they come between the layers, each time as many
            features = output.deepstack_features[0][1]
        parts = [features] if isinstance(features, torch.Tensor) else features
        return sum(part.shape[:-1].numel() for part in parts)


def windows(model):
    """Of each layer, the sliding window; None where there is none."""
    return [kind.window for kind in parts_of(model).kinds]


def words(count, generator):
    """Ids of words leave out those that mean something."""
    return torch.randint(3, 96, (count,), generator=generator)


ALL = {
    name: TinyFamily(page, tiny)
    for page in PAGES.values()
    if hasattr(transformers, page.architectures[0]) and not page.is_too_new
    for name, tiny in page.tiny().items()
}
#: In which a mask can say that a row left, and in which it cannot.
FAMILIES = {name: family for name, family in ALL.items() if not family.tiny.linear}
LINEAR = {name: family for name, family in ALL.items() if family.tiny.linear}

"""What would make the host wait for a GPU, counted on a CPU."""

import torch


class Reads(torch.overrides.TorchFunctionMode):
    """Within: how often values of tensors were read."""

    NAMES = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero")
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.NAMES
        return function(*args, **kwargs or {})

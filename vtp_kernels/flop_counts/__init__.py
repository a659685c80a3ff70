"""What models multiply, from their configurations: decoder layers, vision towers, projectors.

Tables of formulas, each held to what torch's FlopCounterMode counts on a small model. No model is
built: the count after a pruned call, and of a configuration alone, takes microseconds.
"""

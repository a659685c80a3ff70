"""Which models are taken, and which are not and why: `vtp-kernels models`."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from typing import Any

import transformers

from vtp_kernels.models import supported_models
from vtp_kernels.models.families.refused import refused
from vtp_kernels.vllm import MODELS as BUDGETED
from vtp_kernels.vllm.encoder import FAMILIES as ENCODED

__all__ = ["Catalogue", "catalogue"]

HEAD = ("family", "tokens may leave before", "positions", "tower scores", "vLLM")


@dataclass(frozen=True)
class Catalogue:
    """`str()` gives a page to read, `to_dict()` plain data for JSON.

    Attributes
    ----------
    transformers : the version that is installed
    families : as `supported_models()`, and of each `vllm`, what of `vtp_kernels.vllm` takes it:
        "budget" (the plugin: all pictures keep one number of tokens), "stages" (the plugin: tokens
        leave between the layers), "encode" (each keeps as many as it needs)
    refused : {model_type: why}, of the models of this transformers that read pictures
    """

    transformers: str
    families: dict[str, dict[str, Any]]
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        reasons: dict[str, list[str]] = {}
        for kind, reason in self.refused.items():
            reasons.setdefault(reason, []).append(kind)
        parts = [
            f"Taken, here with transformers {self.transformers}:\n",
            *self._families(),
            "\nNot taken, of the other models in it that read pictures, and why:\n",
            *(
                f"{reason}\n{_indented(', '.join(kinds))}"
                for reason, kinds in sorted(reasons.items(), key=lambda item: -len(item[1]))
            ),
        ]
        return "\n".join(parts)

    def _families(self) -> list[str]:
        rows = [HEAD]
        for name, family in self.families.items():
            lists = (", ".join(family[key]) for key in ("positions", "tower_scores", "vllm"))
            rows.append((name, family["layers"], *(cell or "none" for cell in lists)))
        widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
        lines = [
            "".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        details = ["", *map(self._details, self.families.values())]
        return [line + rest for line, rest in zip(lines, details, strict=True)]

    def _details(self, family: dict[str, Any]) -> str:
        classes = (
            name if name in family["available"] else f"{name} (not in this transformers)"
            for name in family["architectures"]
        )
        said = (
            f"{', '.join(classes)}, from transformers {family['transformers']} on",
            *([f"as {family['example']}"] if family["example"] else []),
            f"with {', '.join(family['text_models'])}",
            *(f"but: {limit}" for limit in family["limits"]),
        )
        return "".join(f"\n{_indented(line)}" for line in said)


def _indented(line: str) -> str:
    return textwrap.fill(
        line, 100, initial_indent="    ", subsequent_indent="      ", break_on_hyphens=False
    )


def catalogue() -> Catalogue:
    """What this package takes of the installed transformers."""
    families = supported_models()
    for name, family in families.items():
        budgeted = not BUDGETED.keys().isdisjoint(family["architectures"])
        family["vllm"] = ["budget", "stages"] * budgeted + ["encode"] * (name in ENCODED)
    taken = {name for family in families.values() for name in family["architectures"]}
    return Catalogue(transformers.__version__, families, refused(taken))

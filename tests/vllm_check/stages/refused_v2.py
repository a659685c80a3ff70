"""An engine that is not to start, by model runner V2: `python refused_v2.py SETTINGS`, as JSON."""

import json
import sys
from pathlib import Path

import v2  # noqa: F401

sys.path.append(str(Path(__file__).parents[1]))

import asking

if __name__ == "__main__":
    asking.llm(**json.loads(sys.argv[1]))

"""vLLM without the plugin, by model runner V2: `python plain_v2.py MODEL COUNT`."""

import sys
from pathlib import Path

import v2  # noqa: F401

sys.path.append(str(Path(__file__).parents[1]))

import plain

if __name__ == "__main__":
    plain.main(sys.argv[1], int(sys.argv[2]), max_num_seqs=16)

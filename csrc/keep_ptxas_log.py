"""Compiler launcher: runs nvcc and keeps what it says next to the object, in <source>.ptxas.txt.

ninja shows the output of a compilation once at best; the code generation test reads it later.
"""

import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
run = subprocess.run(command, stderr=subprocess.PIPE, text=True)
lines = run.stderr.splitlines(keepends=True)
if run.returncode == 0 and "-o" in command:
    target = Path(command[command.index("-o") + 1])
    target.with_suffix(".ptxas.txt").write_text(run.stderr)
    lines = [line for line in lines if "warning" in line.lower()]
sys.stderr.writelines(lines)
sys.exit(run.returncode)

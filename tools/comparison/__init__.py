"""Learning comparisons on MiniPipe: what is compared (experiments), how it is run (cells), what comes of it (analysis,
results). ``tools/compare_algorithms.py`` is the command."""

import sys
from pathlib import Path

# Cells run this checkout's code; what names and checks them must be the same, whichever checkout is installed.
sys.path.insert(0, str(Path(__file__).parents[2]))

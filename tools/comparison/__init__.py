"""Learning comparisons on MiniPipe: what is compared (experiments), how it is run (cells), what comes of it (analysis,
results). ``tools/compare_algorithms.py`` is the command."""

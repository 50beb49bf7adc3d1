"""What ``tools/gpu_check.py`` runs, a section a file or a function, and what they share (``common``)."""

"""What a run needs and how long it takes, before anything is started.

=============  ==========================================================================
hardware.py    GPUs by name: memory, speed, links
memory.py      bytes of a trainer rank and of an engine, by what holds them
timing.py      seconds of a step, by phase
planner.py     the two together: a verdict, what to change, and layouts ranked
page.py        a plan in words
=============  ==========================================================================

Everything is a pure function of the configuration and the model's config.json; no device, no weights.
"""

"""What a run needs and how long it takes, before anything is started.

=============  ==========================================================================
hardware.py    GPUs by name: memory, speed, links
assumed.py     lengths of samples, shares of stated speeds
memory.py      bytes of a trainer rank, by what holds them
engines.py     weights and cache of an engine, how many sequences at once, seconds of generation
timing.py      FLOPs and seconds of a step, by phase
planner.py     the two together: a verdict, what to change, and layouts ranked
page.py        a plan in words
=============  ==========================================================================

Everything is a pure function of the configuration and the model's config.json; no device, no weights.
"""

"""Generation: the SGLang engines, and everything that talks to them.

======================  ==============================================================================
``fleet``               starts the engines and the router in front of them, watches and ends them
``client``              asynchronous generation, token ids in and out (coordinator)
``control``             synchronous control of one engine: weights, versions, probes (trainer ranks)
``engine_main``         the process of one engine: SGLang's own server, unmodified
``router_main``         the process of the router: sglang-router's own launcher, unmodified
``cpu_platform``        what SGLang's wheel needs to run on a machine without CUDA
``cpu_sampling``        there: samples that follow from a seed
``cpu_fp8``             there: the products of layers in block FP8
``lifeline``            ties a process to the one that started it
======================  ==============================================================================

Only ``engine_main`` and the ``cpu_`` files load SGLang and torch; the rest stays small enough for the coordinator.
"""

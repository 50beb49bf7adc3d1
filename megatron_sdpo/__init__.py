"""SDPO (Self-Distillation Policy Optimization) on Megatron-core and SGLang.

The data meets the files in this order; an import never points up the list (tests/test_imports.py)::

    types  phases  timeline  config  fp8_format  hf_config  flops  sandbox  tasks  chat  quantization_kernels
    quantization  rollout  teacher_context  prefixes  batching  vocabulary_kernels  vocabulary  divergence  fused
    credit  objective  teacher  guard  spikes  mcore  reshard  loop  discovery  evaluate  measures  tracking
    profiler  report  scaling  launch  cli
"""

__version__ = "0.1.0"

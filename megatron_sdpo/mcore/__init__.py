"""The only importer of megatron.core: the model, its process groups, its weights.

==================  ==========================================================================
platform.py         Megatron's spelled-out "cuda" redirected to the CPU where there is no GPU
groups.py           process groups of a layout, as a frozen record that travels as an argument
elementwise.py      norm, gated unit and rotary embedding for CPUs
modules.py          packed rows, and causal attention for CPUs
continuing.py       where pieces of a row stand that continue others
te_attention.py     Transformer Engine's attention for such rows
rotary.py           rotary frequencies of a config
experts.py          mixtures of experts, also where tensor ranks hold the same tokens
fp8.py              the precision of each pass: Transformer Engine's FP8, or its emulation
fp8_codes.py        a teacher's passes in FP8: codes written at once
model.py            Hugging Face config -> Megatron config -> a rank's stages of the model
names.py            pure: Hugging Face names <-> Megatron parameters and their shards; no megatron
hf.py               Hugging Face checkpoints into the local shard, and back to disk
streaming.py        whole checkpoints from one format to the other, a parameter at a time
safetensors_writer  a checkpoint's files, tensor by tensor
forward.py          Megatron's schedules: scoring passes and training passes
passes.py           where those passes are, for a timeline
optimizer.py        DDP and AdamW around the model; its step in two halves
weights.py          master weights, moments and teacher: whole on every data rank, or divided
learner.py          score, train, teach, probe: what loop.py calls
dealing.py          which samples each data rank passes
targets.py          what a micro-batch's responses are held to
scores.py           what the scoring passes find
finite.py           numbers and norms that stop a run, or a step
inspection.py       a learner that takes one step apart
performance.py      what a batch's passes cost
checkpoint.py       everything that training depends on: saved, verified, found again
background_save.py  the files of one save, written beside training
generators.py       the states of every random generator of a rank
manifest.py         pure: which files a checkpoint has, and their digests; no torch
==================  ==========================================================================

The redirection happens here, before any submodule can import megatron.
"""

from megatron_sdpo.mcore import platform

platform.redirect_torch()

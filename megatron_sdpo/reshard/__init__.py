"""Trainer shards -> Hugging Face tensors -> engines, versioned and checked; the only writer of engine weights.

=============  =========================================================================
plan.py        pure: which rank sends which tensors, in which bucket
gather.py      the tensors of a bucket, whole, on the rank that sends them
quantize.py    what FP8 engines load instead of them
digest.py      a fingerprint of what was sent
transport.py   one process group per pipeline stage, broadcast to every engine
handles.py     or handles to the memory that trainer and engines share
background.py  calls to engines side by side, which never keep the process from ending
publish.py     a version goes out, is checked against what the engines serve, or is taken back
=============  =========================================================================
"""

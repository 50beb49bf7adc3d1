"""Processes: what each role runs, and who starts and watches them.

================  =====================================================================
``run_dir``       the run directory: what is where, the lock, the token
``coordinator``   the coordinator's process: make_batch and evaluations on request
``trainer``       a trainer rank's process: builds the parts of loop.train
``local``         all roles on this machine: start, watch, stop together
================  =====================================================================
"""

"""Processes: what each role runs, and who starts and watches them.

==================  =====================================================================
``run_dir``         the run directory: what is where, the lock, the token
``status``          how a run stands, and how it is asked to stop
``coordinator``     the coordinator's process: make_batch and evaluations on request
``trainer``         a trainer rank's process: builds the parts of loop.train
``agreement``       ranks with another configuration or code than the others refuse to start
``watchdog``        ranks that do not get on end the run, and say who did not arrive
``stragglers``      which rank is slow, by its own work
``replay_trainer``  in a trainer's place, one step of a run again, taken apart
``roles``           the process of a role: start, words of its end, stop
``local``           all roles on this machine: start, watch, stop together
``cluster``         the roles of a batch job on several nodes
``doctor``          is this machine ready? with ``doctor_software`` and ``doctor_machine``
``nemo``            NeMo-Run's command line; ``nemo_experiments``, ``nemo_executors`` below it
``nemo_tasks``      what its jobs run, and ``nemo_step``, what they run it by; without NeMo-Run
==================  =====================================================================
"""

"""A run on several nodes, inside one batch job: one process a node, which find each other in the run directory.

slurm/job.sh starts ``python -m megatron_sdpo.launch.cluster.node RECIPE [key=value ...]`` once on every node. The first
node's starts a conductor beside itself, which gives the orders; all speak through files of the attempt's directory
(``RUN_DIR/slurm/attempt-N/``), so that containers, interfaces and schedulers do not matter.

=============  =====================================================================
``site``       what the site and the job say in the environment (slurm/site.env)
``split``      which node does what: a pure function of configuration and nodes
``facts``      what a node finds of itself: address, versions, GPUs, NCCL's settings
``health``     which nodes are not fit, judged from their facts and measurements
``bandwidth``  all-reduces in every node, and between neighbours
``attempt``    the files of one attempt
``node``       one node's process: facts, measurements, roles, signs of life
``conductor``  orders, watches, and says how the attempt ended (launch/status.py)
=============  =====================================================================
"""

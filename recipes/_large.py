"""SDPO of a dense model of about 70B on 16 or 32 nodes of eight H100, FP8 student and teacher.

**How the nodes are used.** Half of them train, half generate. `megatron-sdpo plan` finds a step of 96 s for 64 + 64
GPUs, 104 s for 96 + 32, 123 s for 32 + 96. Generation runs one batch ahead (``rollout.max_staleness=1``), so a step
takes as long as the slower half; the importance weights correct for it. Engines have eight GPUs each: with four they
would be half as fast, and the longest response of a batch is what a step waits for.

**A copy of the model** is cut over 64 GPUs, tp4 x cp2 x pp8: tensor and context ranks share a node, where their
exchanges have NVLink, and the pipeline crosses nodes. Of 120 layouts of 64 ranks (``--suggest``) this is the fastest of
those that fit: nothing needs to be computed again, since context ranks halve what each sequence leaves on a rank.
tp8pp8 exchanges more in every layer and computes all again (79 s of trainer time instead of 53 s), as does tp2 (55 s).
32 nodes have two copies and twice the questions, so a step takes as long.

These are predictions; nothing here has run on a GPU yet.
"""

from dataclasses import replace

from megatron_sdpo.config import CheckpointConfig, Config, Fp8Config, Fp8Kind, LayoutConfig
from recipes import _paper as paper

QUESTIONS_PER_COPY = 128
"""Four times the paper's batch, so that eight pipeline stages are filled: 288 micro-batches of average sequences."""


def sdpo(name: str, model: str, kind: Fp8Kind, copies: int) -> Config:
    """The paper's settings without rich feedback (JSD, K = 100, EMA 0.05, one optimizer step a batch), at the smaller
    learning rate of its search grid. ``copies`` of the model are trained, each with eight engines."""
    plain = paper.rollout(verify_workers=8)
    return Config(
        name=name,
        run_dir=f"runs/{name}",
        steps=100,
        model=paper.model(model),
        task=paper.sciknoweval("chemistry"),
        layout=LayoutConfig(
            tensor_parallel=4,
            sequence_parallel=True,
            pipeline_parallel=8,
            context_parallel=2,
            world_size=64 * copies,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            tokens_per_micro_batch=8192,
        ),
        fp8=Fp8Config(student=kind, teacher=kind, floor_limit=0.01),
        engine=paper.engines(8 * copies, tensor_parallel=8),
        rollout=replace(plain, prompts_per_step=QUESTIONS_PER_COPY * copies, max_staleness=1),
        teacher_context=paper.teacher_context(feedback=False),
        teacher=paper.teacher(0.05),
        objective=paper.sdpo(alpha=0.5, top_k=100),
        optim=replace(paper.adamw(1e-6, 10, 32), mini_batches=1),
        publish=paper.publish(),
        checkpoint=CheckpointConfig(every=10),
        evaluation=paper.evaluation(4),
    )

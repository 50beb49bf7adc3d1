# The image for H100 and H200 nodes: trainer, coordinator and engines in one environment. Not yet built, for want of a
# machine that may; that its versions fit each other is tested from the packages' own metadata (tests/test_container.py).
#
#   docker build -t megatron-sdpo:0.1.0 .
#   enroot import --output megatron-sdpo.sqsh dockerd://megatron-sdpo:0.1.0
#   SDPO_CONTAINER=$PWD/megatron-sdpo.sqsh SDPO_PYTHON=/opt/venv/bin/python sbatch slurm/...
#
# The toolkit must be of the CUDA release that torch was built with, for the two parts that are compiled here.
FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1
# bubblewrap: programs that the model writes; libnuma, ibverbs and rdmacm: engines and NCCL over InfiniBand
RUN apt-get update && apt-get install -y --no-install-recommends \
        build-essential bubblewrap ca-certificates curl git libibverbs1 libnuma1 librdmacm1 ibverbs-providers \
        python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3.12 -m venv /opt/venv && /opt/venv/bin/pip install uv==0.13.9
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH

# Whole and exact, and so without a resolver. Without Transformer Engine's CUDA 12 core: see the Makefile, gpu-lock.
COPY requirements/gpu.txt /tmp/gpu.txt
RUN grep -v '^transformer-engine-torch==' /tmp/gpu.txt > /tmp/wheels.txt \
    && uv pip install --no-deps --requirement /tmp/wheels.txt

# For Hopper only. Headers of cuDNN and NCCL are those that torch's own packages bring.
ENV TORCH_CUDA_ARCH_LIST=9.0 MAX_JOBS=16 CUDA_HOME=/usr/local/cuda
RUN packages=/opt/venv/lib/python3.12/site-packages/nvidia \
    && CPATH=$packages/cudnn/include:$packages/nccl/include NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE \
       uv pip install --no-deps --no-build-isolation "$(grep '^transformer-engine-torch==' /tmp/gpu.txt)"

# NVIDIA's repository; the package of this name on PyPI is another project
ARG APEX=10417ace
RUN git clone https://github.com/NVIDIA/apex.git /tmp/apex && git -C /tmp/apex checkout "$APEX" \
    && pip install --no-deps --no-build-isolation --config-settings "--build-option=--cpp_ext --cuda_ext --parallel 8" \
       /tmp/apex \
    && rm -rf /tmp/apex

COPY . /opt/megatron-sdpo
RUN uv pip install --no-deps --no-build-isolation /opt/megatron-sdpo

# Scales of FP8 blocks as engines and checkpoints have them (read when Transformer Engine is imported), kernels in the
# order in which Megatron starts them, and the libraries that Transformer Engine looks for.
ENV NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 CUDA_DEVICE_MAX_CONNECTIONS=1 \
    LD_LIBRARY_PATH=/opt/venv/lib/python3.12/site-packages/nvidia/cu13/lib:/opt/venv/lib/python3.12/site-packages/nvidia/cudnn/lib:/opt/venv/lib/python3.12/site-packages/nvidia/nccl/lib
# What can be said without a GPU: that everything loads.
RUN python -c "import torch, transformer_engine.pytorch, megatron.core, apex.normalization, fused_weight_gradient_mlp_cuda"

ENTRYPOINT []
CMD ["megatron-sdpo", "doctor"]

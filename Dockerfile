# Two images from one file.
#   docker build -t megatron-midus .                 GPU: torch, Transformer Engine and apex come with NVIDIA's PyTorch image
#   docker build --target cpu -t megatron-midus:cpu . CPU: the quickstart and the tests
# Run:  docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/runs" megatron-midus torchrun --nproc-per-node 8 pretrain_midus.py --help
# The base that Megatron-LM's own CI builds on (docker/.ngc_version.dev); 25.09-py3 is its long-term one.
ARG NGC_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
ARG PYTHON_IMAGE=python:3.11.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS cpu
# The package index has torch for CUDA, gigabytes larger. Releases of this one, 2.13.0+cpu, count as the newer of the two.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/megatron_midus
RUN useradd --create-home --uid 10001 midus && chown midus /opt/megatron_midus
# Requirements before sources: editing a source file does not install everything again.
COPY --chown=midus setup.py pyproject.toml constraints.txt README.md ./
COPY --chown=midus megatron_midus/__init__.py megatron_midus/__init__.py
COPY --chown=midus pretrain_midus.py ./
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 MIDUS_VENV=none
RUN pip install -c constraints.txt --extra-index-url "${TORCH_INDEX}" setuptools torch && pip install -c constraints.txt --no-build-isolation -e ".[dev]"
COPY --chown=midus . .
USER 10001
HEALTHCHECK CMD ["python", "-m", "megatron_midus.platform"]
CMD ["bash", "examples/quickstart.sh"]

FROM ${NGC_IMAGE} AS gpu
WORKDIR /opt/megatron_midus
RUN useradd --create-home --uid 10001 midus && chown midus /opt/megatron_midus
COPY --chown=midus setup.py pyproject.toml README.md ./
COPY --chown=midus megatron_midus/__init__.py megatron_midus/__init__.py
COPY --chown=midus pretrain_midus.py ./
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 MIDUS_VENV=none \
    CUDA_DEVICE_MAX_CONNECTIONS=1
# No constraints here: torch, Transformer Engine and apex of the image stay as NVIDIA built them together.
RUN pip install --no-build-isolation -e .
COPY --chown=midus . .
USER 10001
HEALTHCHECK CMD ["python", "-m", "megatron_midus.platform"]
CMD ["python", "pretrain_midus.py", "--help"]

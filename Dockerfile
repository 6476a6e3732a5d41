# syntax=docker/dockerfile:1
# docker build -t fopd . && docker run --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" fopd fopd run recipes/...
# (runs/ must be writable for user 1000, or give --user "$(id -u)").
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH

# gcc and the headers: Triton compiles at run time. bubblewrap: the sandbox; git: what a coding agent's repositories need.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        python3 python3-venv python3-dev gcc g++ libc6-dev bubblewrap git \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv "$VIRTUAL_ENV"

WORKDIR /workspace

# Dependencies first, so that a change of our code does not install them again. mini-swe-agent comes without its
# requirements, of which our part of it needs those in the extra swe (fopd_cli/tasks/swe/agent.py).
COPY pyproject.toml README.md ./
COPY constraints constraints
COPY fopd_cli/__init__.py fopd_cli/__init__.py
RUN pip install -c constraints/cuda.txt ".[data,vllm,lora,tools,swe]" \
    && pip install --no-deps mini-swe-agent==2.4.6

COPY . .
RUN pip install --no-deps . && fopd --version

# Not root: what a model wrote is executed here. Ubuntu's image has user 1000, "ubuntu".
RUN mkdir -p /workspace/runs && chown -R 1000:1000 /workspace/runs
ENV HOME=/home/ubuntu
USER 1000

# Whether the package and what it stands on can be imported, and whether a GPU's driver answers if one was given.
HEALTHCHECK --interval=5m --timeout=60s --start-period=30s --retries=3 \
    CMD fopd --version && python -c "import torch, os; assert not os.path.exists('/dev/nvidiactl') or torch.cuda.device_count()"

CMD ["fopd", "--help"]

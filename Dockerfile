# syntax=docker/dockerfile:1
# docker build -t fopd . && docker run --gpus all --ipc=host -v "$PWD/runs:/workspace/runs" fopd fopd run recipes/...
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH

# gcc and the headers: Triton compiles at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv "$VIRTUAL_ENV"

WORKDIR /workspace

# Dependencies first, so that a change of our code does not install them again.
COPY pyproject.toml README.md ./
COPY constraints constraints
COPY fopd_cli/__init__.py fopd_cli/__init__.py
RUN pip install -c constraints/cuda.txt ".[data,vllm]"

COPY . .
RUN pip install --no-deps . && fopd --version

CMD ["fopd", "--help"]

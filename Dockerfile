# syntax=docker/dockerfile:1
# An image of longrl for NVIDIA GPUs (the default) or for CPUs. docs/install.md says how to run it.
#
#   docker build -t longrl .
#   docker build -t longrl:cpu --build-arg DEVICE=cpu .
#   docker run --rm --gpus all longrl          # python -m longrl doctor: what this machine can do
ARG DEVICE=cuda

# All tests run with this Python, 3.11, and these pins.
FROM debian:bookworm-slim AS system-cpu
ENV LOCK=cpu.lock

# CUDA 13.0 is what the torch of gpu.lock is built for: the host needs an NVIDIA driver of version 580 or newer. The
# libraries of CUDA come with torch's wheels; the image adds nvcc, with which FlashInfer and flash-attn compile.
# Ubuntu 24.04 has Python 3.12; 22.04 has 3.10, too old for longrl. `video` lets torchcodec decode by NVDEC.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS system-cuda
ENV LOCK=gpu.lock NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility,video

# hadolint ignore=DL3006
FROM system-${DEVICE} AS longrl
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# A compiler and Python's headers: Triton and torch.compile build kernels when a run first needs them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:${PATH} PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
# pip reads this one: PyTorch's index of CPU wheels makes the CPU image some GB smaller.
ARG PIP_EXTRA_INDEX_URL=
# What the lines below mount: kept between builds, in no image.
ARG PIP_CACHE_DIR=/var/cache/pip
COPY requirements/cpu.lock requirements/gpu.lock /opt/longrl/requirements/
RUN --mount=type=cache,target=/var/cache/pip \
    python3 -m venv /opt/venv \
    && pip install -r "/opt/longrl/requirements/${LOCK}"

# flash-attn is not in the image unless you ask: it is released as source, which takes long to compile. Without it
# attention is torch's own flash attention. Name the address of a wheel for Python 3.12, torch 2.13 and CUDA 13, or
# compile: --build-arg FLASH_ATTN="flash-attn>=2.7,<3".
ARG FLASH_ATTN=
ARG MAX_JOBS=4
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/var/cache/pip \
    if [ -n "${FLASH_ATTN}" ]; then pip install --no-build-isolation "${FLASH_ATTN}"; fi

COPY . /opt/longrl
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --no-deps --editable /opt/longrl \
    && python -m longrl.datamodules.media.ffmpeg_links /opt/ffmpeg
# torchcodec has no FFmpeg of its own: it takes PyAV's.
ENV LD_LIBRARY_PATH=/opt/ffmpeg${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}

# --build-arg UID="$(id -u)" makes files in mounted folders yours.
ARG UID=1001
RUN useradd --create-home --uid "${UID}" --non-unique longrl && install --directory --owner=longrl /workspace
# hadolint ignore=DL3066
USER longrl
WORKDIR /workspace
# No HEALTHCHECK: it would start a process beside the run, on its GPU, every 30 s. Ask a container yourself:
# docker exec NAME python -m longrl doctor
ENTRYPOINT ["python", "-m", "longrl"]
CMD ["doctor"]

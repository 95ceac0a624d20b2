# syntax=docker/dockerfile:1
# Training and export: torch, exporters. From the repository's root:
#
#   docker build -f deploy/trainer.Dockerfile -t alexnet-trainer:0.1.0 .
#   docker run --rm --gpus all --shm-size 1g -v "$PWD/data:/data:ro" -v "$PWD/runs:/work/runs" \
#     --user "$(id -u):$(id -g)" alexnet-trainer:0.1.0 train /data
#
# torch comes with CUDA's libraries, and wants a host with NVIDIA's container toolkit only to use them.
# Without a GPU, gigabytes are saved: PyTorch's install page ("CPU") names an index of smaller builds of
# the same version, which pip prefers where it is given:
#
#   docker build -f deploy/trainer.Dockerfile --build-arg TORCH_INDEX=<that index> -t alexnet-trainer:0.1.0-cpu .
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG EXTRAS=train,export
ARG TORCH_INDEX=
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE alexnet.py ./
COPY commands commands
COPY model model
COPY export export
COPY serving serving
RUN --mount=type=cache,target=/root/.cache/pip \
    PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" \
    pip wheel --disable-pip-version-check --constraint constraints.txt --wheel-dir /wheels ".[${EXTRAS}]"
# The versions are those of the wheels: nothing else can be reached.
# hadolint ignore=DL3013
RUN python -m venv --without-pip /opt/alexnet \
    && pip --python /opt/alexnet/bin/python install --disable-pip-version-check --no-cache-dir --no-index \
       --find-links /wheels "alexnet-serving[${EXTRAS}]"

FROM python:${PYTHON} AS trainer
COPY --from=build /opt/alexnet /opt/alexnet
ENV PATH=/opt/alexnet/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /work
USER 10001:10001
ENTRYPOINT ["alexnet"]
CMD ["--help"]

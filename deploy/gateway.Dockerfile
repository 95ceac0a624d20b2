# syntax=docker/dockerfile:1
# The gateway: the core and tritonclient, no torch. From the repository's root:
#
#   docker build -f deploy/gateway.Dockerfile -t alexnet-gateway:0.1.0 .
#   docker run --rm --read-only --tmpfs /tmp --cap-drop ALL -p 127.0.0.1:8000:8000 \
#     -v "$PWD/model_repository:/srv/model_repository:ro" alexnet-gateway:0.1.0
#
# The scorer of deploy/kubernetes/jobs/score, with one more extra (pyarrow):
#
#   docker build -f deploy/gateway.Dockerfile --target scorer --build-arg EXTRAS=triton,score \
#     -t alexnet-scorer:0.1.0 .
#
# A tag can be moved under you. Before production, pin the base by digest: python:3.11-slim-bookworm@sha256:...
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
ARG EXTRAS=triton
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE alexnet.py ./
COPY commands commands
COPY model model
COPY export export
COPY serving serving
# Everything becomes a wheel here, so that what only building needs stays in this stage.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --disable-pip-version-check --constraint constraints.txt --wheel-dir /wheels ".[${EXTRAS}]"
# The versions are those of the wheels: nothing else can be reached.
# hadolint ignore=DL3013
RUN python -m venv --without-pip /opt/alexnet \
    && pip --python /opt/alexnet/bin/python install --disable-pip-version-check --no-cache-dir --no-index \
       --find-links /wheels "alexnet-serving[${EXTRAS}]"

FROM python:${PYTHON} AS base
COPY --from=build /opt/alexnet /opt/alexnet
ENV PATH=/opt/alexnet/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /srv
# A number, because Kubernetes' runAsNonRoot cannot look a name up. Nothing in the image belongs to it.
USER 10001:10001
ENTRYPOINT ["alexnet"]

FROM base AS scorer
# The scorer stops as for Ctrl-C; as process 1 it would not even notice a SIGTERM that it does not handle.
STOPSIGNAL SIGINT
CMD ["score", "--help"]

FROM base AS gateway
ENV ALEXNET_HOST=0.0.0.0 \
    ALEXNET_PORT=8000 \
    ALEXNET_MODEL_REPOSITORY=/srv/model_repository
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['ALEXNET_PORT'] + '/livez', timeout=2)"]
# Exec form, no init: the server handles SIGTERM itself, also as process 1, and starts no children.
CMD ["serve"]

# The default experiment in a container: docker build -t fl-attack . && docker run --rm -v "$PWD/outputs:/experiments/outputs" fl-attack
FROM python:3.12-slim

ENV FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 FL_ATTACK_CACHE=/experiments/.cache

WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY scripts/constraints.txt scripts/constraints.txt
COPY conf conf
COPY fl_attack fl_attack
# torch's CPU build: a third of the size; leave the index out for CUDA
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" -c scripts/constraints.txt . \
    && useradd --create-home --uid 1000 researcher \
    && mkdir -p /experiments/outputs \
    && chown -R researcher /experiments

USER 1000
WORKDIR /experiments
ENTRYPOINT ["fl-attack"]

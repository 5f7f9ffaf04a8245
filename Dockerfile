# fastproj with all it needs; docs/containers.md says how to build and run it.
# The torch wheel brings CUDA; the host brings only its driver.
ARG BASE=debian:bookworm-20250520-slim@sha256:90522eeb7e5923ee2b871c639059537b30521272f10ca86fdbbbb2b75a8c40cd

FROM ${BASE} AS build
ARG EXTRAS="dali onnx parquet tensorboard timm wandb"
WORKDIR /fastproj
# The set-up alone first: a change of the code then leaves this layer, and its 7 GB, as they are.
COPY setup.sh setup.py pyproject.toml constraints.txt LICENSE ./
COPY fastproj/__init__.py fastproj/
COPY fastproj/augment/augment.c fastproj/augment/
COPY fastproj/evaluation/probes/nearest.c fastproj/evaluation/probes/
COPY fastproj/loaders/fill.c fastproj/loaders/
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates \
    && touch README.md && mkdir rcfg \
    && PIP_NO_CACHE_DIR=1 ./setup.sh ${EXTRAS}

FROM ${BASE}
# g++ and Python's headers are torch.compile's: for a CPU it writes C++ that includes Python.h, for a
# GPU its Triton compiles the C that launches a kernel. The libraries are our decoder's and FFCV's.
RUN apt-get update && apt-get install -y --no-install-recommends \
        ca-certificates g++ libpython3-dev python3 \
        libjpeg62-turbo libopencv-core406 libopencv-imgproc406 libturbojpeg0 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --home-dir /cache fastproj \
    && install -d -m 1777 /cache /workspace
COPY --from=build /fastproj/.venv /fastproj/.venv
COPY . /fastproj
COPY --from=build /fastproj/fastproj/_native.abi3.so /fastproj/fastproj/
ARG COMMIT
RUN /fastproj/.venv/bin/python -m compileall -q /fastproj/fastproj \
    && echo "${COMMIT}" >/fastproj/.commit
# Caches of torch.compile, matplotlib, Hugging Face and others. USER: for docker run --user, whose
# number has no name here, which torch.compile asks for.
ENV PATH=/fastproj/.venv/bin:$PATH HOME=/cache USER=fastproj \
    XDG_CACHE_HOME=/cache TORCHINDUCTOR_CACHE_DIR=/cache/inductor
VOLUME /cache
USER 1000:1000
WORKDIR /workspace
HEALTHCHECK --interval=30m --timeout=2m --start-period=2m CMD ["fastproj", "doctor"]
CMD ["fastproj", "demo"]

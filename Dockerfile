# fastproj with all it needs. Build and run, with the NVIDIA container toolkit where there is a GPU:
#   docker build -t fastproj .
#   docker run --rm -it fastproj make demo
#   docker run --rm -it --gpus all --ipc host -v /my/betons:/fastproj/data \
#       -v /my/runs:/fastproj/runs fastproj .venv/bin/python -m fastproj.train --cfg rcfg/in100.yaml
# The torch wheel brings CUDA; the host brings only its driver.
FROM debian:bookworm-slim
WORKDIR /fastproj
# The set-up alone first: a change of the code then leaves this layer, and its 7 GB, as they are.
COPY setup.sh setup.py pyproject.toml constraints.txt LICENSE ./
COPY fastproj/__init__.py fastproj/
COPY fastproj/augment/augment.c fastproj/augment/
COPY fastproj/loaders/fill.c fastproj/loaders/
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates make \
    && touch README.md && mkdir rcfg \
    && ./setup.sh dali dev \
    && rm -rf /var/lib/apt/lists/* /root/.cache
COPY . .
CMD ["make", "demo"]

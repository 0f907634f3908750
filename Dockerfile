# Bitladder in a container, from a checkout: docker build -t bitladder .
#
#   docker run --rm -v "$PWD:/work" -v bitladder:/data bitladder recommend
#   docker run --rm -v "$PWD:/work" -v bitladder:/data bitladder run smollm2-135m
#   docker run --rm -v "$PWD:/work" -v bitladder:/data -p 127.0.0.1:8077:8077 bitladder serve smollm2-135m --host 0.0.0.0 --open-to-all
#
# Without a GPU PyTorch's build for processors is several gigabytes smaller: PyTorch's site names the index that has it, to be given
# as --build-arg TORCH_INDEX=URL.
FROM python:3.12-slim

# libgomp: llama.cpp's threads
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*

WORKDIR /src
ARG TORCH_INDEX=
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY examples ./examples
RUN pip install --no-cache-dir -c constraints.txt .

RUN useradd --create-home bitladder && mkdir /data /work && chown bitladder /data /work
USER bitladder
ENV BITLADDER_CACHE=/data/cache BITLADDER_DATA=/data/evidence HF_HOME=/data/huggingface
VOLUME /data
WORKDIR /work
EXPOSE 8077
ENTRYPOINT ["bitladder"]
CMD ["--help"]

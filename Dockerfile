# Veneer in a container. For a processor, or with CUDA for NVIDIA's cards:
#
#     docker build --tag veneer .
#     docker build --tag veneer:cuda --build-arg TORCH=cu130 .
#     docker run --rm --volume "$PWD:/work" veneer tune MODEL rows.jsonl
#     docker run --rm --gpus all --volume "$PWD:/work" veneer:cuda tune MODEL rows.jsonl
#
# TORCH is the folder of torch's own index: cpu, or a CUDA version. PYTHON is an image of Debian's.
ARG PYTHON=3.12-slim-trixie

# The native parts are compiled here, so that the image needs no compiler.
FROM python:${PYTHON} AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN HATCH_BUILD_HOOKS_ENABLE=true pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}
ARG TORCH=cpu
# Without serve: pass EXTRAS= ; each extra is explained in docs/install.md.
ARG EXTRAS=[serve,plot]
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --index-url "https://download.pytorch.org/whl/${TORCH}" 'torch>=2.10' \
 && pip install --no-cache-dir "$(echo /wheels/*.whl)${EXTRAS}" \
 && rm -r /wheels
# Nobody in particular: results are written to what is mounted at /work, by whom --user names.
RUN useradd --create-home --uid 1000 veneer && install --directory --owner veneer /work
USER veneer
WORKDIR /work
EXPOSE 8000
ENTRYPOINT ["veneer"]
CMD ["--help"]

# The images of Onstream: `slim` for the workers that hold no model (verifier, teacher-external, jobs that only tidy up), `cpu` for every
# kind, with torch for CPUs, and `cuda` for every kind, with torch and vLLM for GPUs. Versions are those of requirements.lock.
#
#   docker build --target cpu --tag onstream:cpu .
#
# Build arguments: BASE_IMAGE, an image with Python 3.11; EXTRAS, further extras of pyproject.toml, such as `tasks`; PIP_EXTRA_INDEX_URL, a
# further package index: with PyTorch's own of builds for CPUs, `cpu` does not bring the libraries of GPUs along.
ARG BASE_IMAGE=python:3.11-slim-bookworm


FROM ${BASE_IMAGE} AS base
ARG PIP_EXTRA_INDEX_URL
ARG EXTRAS
ENV INSTALL="python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action ignore --constraint /app/requirements.lock"
RUN groupadd --gid 1000 onstream \
 && useradd --uid 1000 --gid 1000 --create-home onstream \
 && mkdir --parents /app/runs /run/onstream /home/onstream/hub \
 && chown onstream:onstream /app/runs /run/onstream /home/onstream/hub
WORKDIR /app
COPY pyproject.toml requirements.lock ./
# The project without its packages: what they depend on, in a layer that a change of the code leaves alone.
RUN touch README.md LICENSE && ${INSTALL} ".${EXTRAS:+[$EXTRAS]}" && rm -rf build ./*.egg-info README.md LICENSE
# Nothing is imported from the working directory; a user of any number has a home and a name.
ENV PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HOME=/home/onstream USER=onstream HF_HOME=/home/onstream/hub \
    MPLCONFIGDIR=/tmp/matplotlib TOKENIZERS_PARALLELISM=false TRANSFORMERS_NO_ADVISORY_WARNINGS=1
STOPSIGNAL SIGTERM
ENTRYPOINT ["onstream"]
CMD ["--help"]


FROM base AS wheel
RUN ${INSTALL} setuptools
COPY README.md LICENSE ./
COPY onstream onstream
COPY settings settings
COPY pipeline pipeline
COPY workers workers
RUN python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheel .


FROM base AS slim
COPY --from=wheel /wheel /wheel
RUN ${INSTALL} --quiet --no-deps --force-reinstall /wheel/onstream-*.whl
COPY examples examples
COPY configs configs
USER 1000:1000


FROM base AS cpu-dependencies
ARG PIP_EXTRA_INDEX_URL
RUN ${INSTALL} 'onstream[train,lora]'


FROM cpu-dependencies AS cpu
COPY --from=wheel /wheel /wheel
RUN ${INSTALL} --quiet --no-deps --force-reinstall /wheel/onstream-*.whl
COPY examples examples
COPY configs configs
USER 1000:1000


# What vLLM depends on is not in requirements.lock; the versions that it shares with the other images are. Triton compiles as it runs.
FROM base AS cuda-dependencies
RUN apt-get update --quiet \
 && apt-get install --yes --quiet --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action ignore 'onstream[vllm,lora]'


FROM cuda-dependencies AS cuda
COPY --from=wheel /wheel /wheel
RUN ${INSTALL} --quiet --no-deps --force-reinstall /wheel/onstream-*.whl
COPY examples examples
COPY configs configs
USER 1000:1000

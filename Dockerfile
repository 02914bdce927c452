# The same two jobs in a container:
#   docker build -t replivit .
#   mkdir -p case                                                 # writable by user 1000; docker would make it root's
#   docker run --rm -v "$PWD/case:/case" replivit                 # measure and render: records and site stay in ./case
#   docker run --rm replivit make -C /app test VENV=/opt/venv     # the tests
FROM python:3.12-slim
RUN apt-get update \
 && apt-get install --no-install-recommends -y git make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 replivit \
 && mkdir /case /app /opt/venv && chown replivit /case /app /opt/venv
USER replivit
RUN python -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir "torch>=2.6" "torchvision>=0.21"
WORKDIR /app
COPY --chown=replivit . .
RUN /opt/venv/bin/pip install --no-cache-dir --editable '.[dev]' && touch /opt/venv/.installed
ENV REPLIVIT_HOME=/case PATH=/opt/venv/bin:$PATH
VOLUME /case
CMD ["replivit", "leaderboard"]

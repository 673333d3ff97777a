#!/usr/bin/env bash
# Gives a Debian machine without Docker an engine of its own, and base images from Debian's packages where no image can be pulled:
#   engine.sh up     installs Docker, starts an engine on its own data and socket, and makes onstream-base/python:3.11 and onstream-base/redis:7;
#                    prints the socket's address. The first time takes some minutes, later ones seconds
#   engine.sh down   stops that engine; its data stays
set -euo pipefail
home=${ONSTREAM_DOCKER_HOME:-${TMPDIR:-/tmp}/onstream-docker}
export DOCKER_HOST=unix://$home/docker.sock
docker=/usr/bin/docker

alive() { [[ -S $home/docker.sock ]] && $docker version >/dev/null 2>&1; }

install_engine() {
  for tool in /usr/sbin/dockerd /usr/bin/docker-compose /usr/sbin/debootstrap /usr/sbin/iptables; do
    [[ -x $tool ]] || { apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      docker.io docker-compose iptables debootstrap >&2; return; }
  done
}

start_engine() {
  alive && return
  mkdir -p "$home"
  setsid nohup /usr/sbin/dockerd --data-root "$home/data" --exec-root "$home/exec" -H "$DOCKER_HOST" --pidfile "$home/pid" \
    >"$home/dockerd.log" 2>&1 </dev/null &
  for _ in $(seq 120); do alive && return; sleep 0.5; done
  echo "the engine did not answer in 60 s; its log ends:" >&2; tail -n 20 "$home/dockerd.log" >&2; exit 1
}

make_images() {
  $docker image inspect onstream-base/python:3.11 onstream-base/redis:7 >/dev/null 2>&1 && return
  local root=$home/root mirror wheels
  mirror=$(awk '/^URIs:/{print $2; exit}' /etc/apt/sources.list.d/debian.sources)
  rm -rf "$root"
  debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,redis-server,ca-certificates,procps \
    bookworm "$root" "$mirror" >"$home/debootstrap.log" 2>&1 || { tail -n 5 "$home/debootstrap.log" >&2; exit 1; }
  # what an official Python image has, `python` and a pip that installs, and this machine's settings of pip
  ln -sf python3 "$root/usr/bin/python"; rm -f "$root"/usr/lib/python3*/EXTERNALLY-MANAGED
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
  [[ -f /etc/pip.conf ]] && cp /etc/pip.conf "$root/etc/pip.conf"
  wheels=$(python3 -m pip config get global.find-links 2>/dev/null || true)
  mkdir -p "$root/wheels"; [[ -d $wheels ]] && cp "$wheels"/*.whl "$root/wheels/"
  tar -C "$root" -c . | $docker import --change 'ENV PIP_FIND_LINKS=/wheels' --change 'CMD ["python3"]' - onstream-base/python:3.11 >&2
  tar -C "$root" -c . | $docker import --change 'CMD ["redis-server"]' - onstream-base/redis:7 >&2
  rm -rf "$root"
}

case ${1:-} in
  up) install_engine; start_engine; make_images; echo "$DOCKER_HOST" ;;
  down) [[ -f $home/pid ]] && kill "$(cat "$home/pid")" ;;
  *) sed -n '2,5p' "$0"; exit 2 ;;
esac

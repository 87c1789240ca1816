#!/usr/bin/env bash
# Both images by buildah, without a daemon, as root or not: their sizes, and what is in them (build/images).
#   PYTHON_IMAGE=debian    a base made of Debian's own packages (mmdebstrap), where no registry can be reached
# pip reads there what it reads here: its settings are a secret of the build, and what they name of this machine's
# files is mounted below /mnt.
set -euo pipefail
export BUILDAH_ISOLATION=${BUILDAH_ISOLATION:-chroot}
[ "$(id -u)" = 0 ] || [ -n "${_CONTAINERS_USERNS_CONFIGURED:-}" ] || exec buildah unshare bash "$0"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=$(sed -n 's/^VERSION = "\(.*\)"/\1/p' aliprod/version.py)
out=build/images
mkdir -p $out

if [ "${PYTHON_IMAGE:-}" = debian ]; then
  base=$(buildah from scratch)
  mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm - \
    | tar --exclude='./dev/*' -xC "$(buildah mount "$base")"
  PYTHON_IMAGE=localhost/debian-python
  buildah commit --quiet --rm "$base" "$PYTHON_IMAGE" > /dev/null
fi

settings=$out/pip.conf
flags=(--secret "id=pip.conf,src=$settings")
echo "[global]" > $settings
.venv/bin/pip config list | sed -nE "s/^[^.]*\.([a-z-]+)='(.*)'\$/\1 = \2/p" | sort -u -t= -k1,1 >> $settings
for word in $(grep -oE '(^|[ =])(file://)?/[^ ]+' $settings); do
  path=${word#file://}
  [ "$path" = "$word" ] || path=$(dirname "$path")  # an index names files beside it
  [ ! -e "$path" ] || flags+=(--volume "$path:/mnt$path:ro")
done
sed -i -E 's#(^|[ =])(file://)?/#\1\2/mnt/#g' $settings

for target in ray mlflow; do
  image=aliprod:$version
  [ $target = ray ] || image=aliprod-$target:$version
  buildah build --format docker --layers=false --file docker/Dockerfile --target $target --tag "$image" \
    ${PYTHON_IMAGE:+--build-arg PYTHON_IMAGE="$PYTHON_IMAGE"} "${flags[@]}" .
  container=$(buildah from "$image")
  root=$(buildah mount "$container")
  chroot "$root" dpkg-query --show > "$out/$target.debian.txt"
  # cyclonedx-py asks a Python for its packages' folder: the one within the image, seen from here.
  printf '#!/bin/sh\necho "[\\"%s\\"]"\n' "$(echo "$root"/opt/venv/lib/python3.*/site-packages)" > $out/python
  chmod +x $out/python
  build/tools/bin/cyclonedx-py environment $out/python > "$out/$target.cyclonedx.json"
  buildah rm "$container" > /dev/null
  buildah images "$image"
done
build/tools/bin/hadolint docker/Dockerfile

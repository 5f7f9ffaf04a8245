#!/usr/bin/env bash
# Makes .venv in this checkout, with all that fastproj needs:
#   ./setup.sh [EXTRA...]      EXTRA: dali, dev, onnx, … (the optional dependencies in pyproject.toml)
# It does what "pip install -e .[ffcv,report]" stands for, with the Debian packages that this takes.
# Run it as often as you like: where nothing is to be done it takes a second.
# PYTHON=python3.12 ./setup.sh takes that Python; otherwise the first of python3, python3.13, ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() { printf 'error: %s\n' "$1" >&2; exit 1; }

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The Python to use: that of .venv, unless PYTHON names another one; empty where there is none.
find_python() {
    local name
    for name in ${PYTHON:-.venv/bin/python python3 python3.13 python3.12 python3.11}; do
        if usable "$name"; then
            [ "$("$name" -VV)" != "$(.venv/bin/python -VV 2>/dev/null)" ] || name=.venv/bin/python
            command -v "$name"
            return
        fi
    done
}

# What must be there to make the virtual environment and to compile against Python.
complete() {
    "$1" -c 'import ensurepip, os, sys, sysconfig, venv
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null
}

# The Debian packages whose work nothing on this machine does yet.
missing_packages() {
    local python=$1
    # The compiler serves FFCV's build and our own now, and torch.compile later.
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists libjpeg 2>/dev/null || echo libjpeg-dev
    if [ -z "$python" ]; then
        echo python3-venv python3-dev
    elif ! complete "$python"; then
        python=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        echo "$python-venv" "$python-dev"
    fi
}

# The same for FFCV alone.
missing_for_ffcv() {
    [ -e /usr/include/opencv4/opencv2/core.hpp ] || echo libopencv-core-dev
    [ -e /usr/include/opencv4/opencv2/imgproc.hpp ] || echo libopencv-imgproc-dev
    [ -e /usr/include/turbojpeg.h ] || echo libturbojpeg0-dev
}

apt_line() { echo "apt-get update && apt-get install -y --no-install-recommends $*"; }

# Installs Debian packages; fails where this user may not, or where there are none.
install_packages() {
    command -v apt-get >/dev/null || return
    if [ "$(id -u)" = 0 ]; then
        DEBIAN_FRONTEND=noninteractive sh -c "$(apt_line "$@")"
    else
        sudo -n true 2>/dev/null && sudo -n DEBIAN_FRONTEND=noninteractive sh -c "$(apt_line "$@")"
    fi
}

# Tells one tested state of .venv from another: our own files, Python, and what pip has installed.
state() {
    {
        cat pyproject.toml setup.py constraints.txt setup.sh
        cat fastproj/loaders/fill.c fastproj/augment/augment.c fastproj/evaluation/probes/nearest.c
        ls fastproj/_native.*
        missing_for_ffcv   # installed by hand in the meantime: FFCV is tried again
        .venv/bin/python -c 'import sys; print(sys.version, sys.prefix)'
        ls -d .venv/lib/python3*/site-packages/*.dist-info
    } 2>/dev/null | sha256sum | cut -d' ' -f1
}

# Prints the requirements of pyproject.toml and of the extras named, one per line; all but ffcv.
requirements() {
    .venv/bin/python - "$@" <<'PY'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
if unknown := set(sys.argv[1:]) - extras.keys():
    sys.exit(f"error: no extra named {min(unknown)}; there are: {', '.join(extras)}")
lines = sum((extras[name] for name in sys.argv[1:]), project["dependencies"])
print(*(line for line in lines if not line.startswith("ffcv")), sep="\n")
PY
}

# FFCV uses OpenCV's core and imgproc, but its build asks for all of OpenCV (198 Debian packages):
# an opencv4.pc and an opencv2/opencv.hpp of our own lead it to these two.
install_ffcv() {
    local shim
    shim=$(mktemp -d)   # not in the checkout: FFCV's build splits paths at their spaces
    mkdir "$shim/opencv2"
    printf '#include <opencv2/%s.hpp>\n' core imgproc >"$shim/opencv2/opencv.hpp"
    printf '%s\n' 'Name: OpenCV' 'Description: core and imgproc alone' 'Version: 4' \
        "Cflags: -I$shim -I/usr/include/opencv4" 'Libs: -lopencv_imgproc -lopencv_core' \
        >"$shim/opencv4.pc"
    # No cache: a wheel kept from before a change of the system's OpenCV would no longer load.
    if PKG_CONFIG_PATH=$shim${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH} .venv/bin/python -m pip install \
        --quiet --no-deps --no-build-isolation --use-pep517 --no-cache-dir \
        --constraint constraints.txt ffcv >"$shim/log" 2>&1; then
        rm -r "$shim"
    else
        echo "set-up: without FFCV, whose build failed ($shim/log); only comparisons with FFCV need it"
    fi
}

[ -z "${PYTHON:-}" ] || usable "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.11 or newer"
python=$(find_python)
missing=$(missing_packages "$python" | xargs)
if [ -n "$missing" ]; then
    echo "set-up: Debian packages: $missing"
    # shellcheck disable=SC2046,SC2086  # one word per package
    install_packages $missing || die "Debian packages are missing and could not be installed; \
run: sudo sh -c '$(apt_line $missing $(missing_for_ffcv))'"
    python=$(find_python)
fi
[ -n "$python" ] || die "no Python 3.11 or newer; install one and run: PYTHON=/path/to/python $0"

[ "$python" = .venv/bin/python ] || "$python" -m venv --clear .venv

# .venv/set-up holds the state that was reached and, after it, the extras it has.
reached=()
[ ! -e .venv/set-up ] || read -ra reached <.venv/set-up
extras=$(printf '%s\n' "$@" "${reached[@]:1}" | sort -u | xargs)
[ "${reached[*]}" != "$(state)${extras:+ $extras}" ] || exit 0

echo "set-up: Python packages into .venv (some 7 GB, PyTorch most of it; minutes the first time)"
missing=$(missing_for_ffcv | xargs)
if [ -n "$missing" ]; then
    echo "set-up: Debian packages for FFCV: $missing"
    # shellcheck disable=SC2086
    install_packages $missing || true   # its build then says what it lacks
fi
# shellcheck disable=SC2086  # one word per extra
requirements ffcv report $extras >.venv/requirements.txt
.venv/bin/python -m ensurepip >/dev/null   # an interrupted run leaves a .venv without pip
# No warnings of conflicts: FFCV's own wishes are left out on purpose, and pip calls that an error.
.venv/bin/python -m pip install --disable-pip-version-check --no-warn-conflicts \
    --constraint constraints.txt --requirement .venv/requirements.txt
install_ffcv
rm -f fastproj/_native.*
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
echo "$(state) $extras" >.venv/set-up

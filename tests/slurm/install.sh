#!/bin/sh
# Install Debian's SLURM for the tests; its daemons are left alone, the tests start their own.
# Exits with 1, and says why, where it cannot.
set -eu
if command -v slurmctld slurmd munged > /dev/null; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    echo "SLURM is not installed: needs root and Debian's packages slurm-wlm and munge" >&2
    exit 1
fi
apt-get -qq update
# Without the recommended packages, and without starting daemons that have no configuration yet.
RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends slurm-wlm munge

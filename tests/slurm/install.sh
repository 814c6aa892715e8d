#!/bin/sh
# Install Debian's SLURM for the tests, which start daemons of their own. Exits with 1, and says
# why, where it cannot.
set -eu
if command -v slurmctld > /dev/null && command -v slurmd > /dev/null && command -v munged > /dev/null; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
    echo "SLURM is not installed: that needs root and Debian's packages slurm-wlm and munge" >&2
    exit 1
fi
apt-get -qq update
DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends slurm-wlm munge > /dev/null

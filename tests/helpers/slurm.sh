#!/bin/sh
# The Debian or Ubuntu packages of the SLURM that the tests start: installs what is missing, and starts none of it.
#
#     slurm.sh                 for root, or where sudo asks for no password; else prints the line to type, exit code 1
#     slurm.sh --check         installs nothing: prints that line when some are missing
#     slurm.sh --dry-run       prints the commands that would install them
set -eu

packages=
need() {  # need PACKAGE COMMAND...: the package, unless all of its commands are there
  package=$1
  shift
  for name; do
    if ! (PATH=$PATH:/usr/sbin:/sbin && command -v "$name") >/dev/null; then
      packages="$packages $package"
      return
    fi
  done
}
need slurmctld slurmctld
need slurmd slurmd
need slurm-client sbatch scancel scontrol sinfo squeue sacct sacctmgr
need munge munged
need slurmdbd slurmdbd
need mariadb-server mariadbd mariadb-install-db mariadb-admin
[ -n "$packages" ] || exit 0

missing="The tests need a real SLURM ($(echo $packages) missing)"
without_apt="The tests need a real SLURM; this machine has no apt-get to install$packages with"
. "$(dirname "$0")/apt.sh"

# Debian starts the daemons that it installs, unless this file forbids it; the tests start their own
policy=/usr/sbin/policy-rc.d
if [ -z "$run" ] && [ ! -e $policy ]; then
  trap 'rm -f $policy' EXIT
  trap 'exit 1' INT TERM
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod +x $policy
fi
$run $apt update </dev/null || refuse
$run $apt install -y --no-install-recommends $packages </dev/null || refuse

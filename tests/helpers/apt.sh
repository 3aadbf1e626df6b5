# Sourced by the scripts here that install packages for tests, once they know that something is missing.
#
# Before: `missing` says what for, in words; `without_apt` what to do where there is no apt-get; "$1" is the script's argument.
# After: `$run $apt install -y ... </dev/null || refuse` installs, or with --dry-run prints the command.
refuse() {
  sudo=sudo
  [ "$(id -u)" != 0 ] || sudo=
  echo "$missing. Once, type: ${sudo:+$sudo }sh $(realpath "$0")" >&2
  exit 1
}

case ${1:-} in
  --check) refuse ;;
  --dry-run) run=echo ;;
  *) run= ;;
esac
if ! command -v apt-get >/dev/null; then
  echo "$without_apt" >&2
  exit 1
fi
if [ "$(id -u)" != 0 ] && [ -z "$run" ]; then
  sudo -n true 2>/dev/null || refuse
  exec sudo -n sh "$0"
fi
export DEBIAN_FRONTEND=noninteractive
apt="apt-get -o DPkg::Lock::Timeout=120"

#!/bin/sh
# A Chromium for the tests that open reports, and logs in `inspect view`: installs one, unless there is one.
#
#     browser.sh              for root, or where sudo asks for no password; else prints the line to type, exit code 1
#     browser.sh --check      installs nothing: prints the path of the browser, or that line when there is none
#     browser.sh --dry-run    prints the commands that would install it
# Debian has a package. Ubuntu's is a snap, which containers cannot run: there it is Google's own package.
set -eu

for name in chromium google-chrome google-chrome-stable chromium-browser; do
  # Ubuntu's chromium-browser may be a stand-in that only asks for the snap
  if command -v "$name" >/dev/null && "$name" --version >/dev/null 2>&1; then
    [ "${1:-}" != --check ] || command -v "$name"
    exit 0
  fi
done

missing="Tests open pages in a browser, and there is no Chromium"
without_apt="Tests open pages in a browser; install Chromium or Google Chrome, this machine has no apt-get to do it with"
. "$(dirname "$0")/apt.sh"

$run $apt update </dev/null || refuse
if [ "$(. /etc/os-release && echo "$ID")" = debian ]; then
  $run $apt install -y --no-install-recommends chromium </dev/null || refuse
else
  package=$(mktemp -d)/google-chrome-stable_current_amd64.deb
  $run $apt install -y --no-install-recommends ca-certificates wget </dev/null || refuse
  $run wget -qO "$package" "https://dl.google.com/linux/direct/${package##*/}" || refuse
  $run $apt install -y --no-install-recommends "$package" </dev/null || refuse
fi

#!/usr/bin/env bash
# borrow_packages.sh ENVIRONMENT OTHER [FOLDER...]: let one virtual environment import the packages of another, and what
# lies in folders. What it has itself comes first. A path in a .pth file does not run the .pth files found there, so an
# editable install in the other environment stays out of sight.
set -euo pipefail
environment="$1" other="$2"
shift 2
site_of() { "$1/bin/python" -c 'import sysconfig; print(*{sysconfig.get_path(kind) for kind in ("purelib", "platlib")}, sep="\n")'; }
{ (($# == 0)) || printf '%s\n' "$@"; site_of "$other"; } >"$(site_of "$environment" | head -n 1)/borrowed.pth"

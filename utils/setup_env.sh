# A `python` in which requirements.txt is installed. Source it from a script with `set -e`, after path.sh.
#
# The active environment (venv, conda or plain `python`) is used as it is when it holds the pinned packages. Otherwise .venv is,
# and made first if need be. Its .complete, written last, holds the hash of requirements.txt and the folder's own path, so later
# starts cost nothing; its .building marks one that is not finished, which is thrown away. pip follows your own configuration.

_setup_say() { printf '%(%H:%M:%S)T setup %s\n' -1 "$*" >&2; }

_setup_fail() {
  _setup_say "ERROR $*"
  exit 2
}

_setup_right_version() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

# Whether `python` holds the pinned packages; the reason is left in _setup_reason.
_setup_suitable() {
  _setup_reason="it is not Python 3.11 or 3.12"
  _setup_right_version python && _setup_reason=$(python utils/check_env.py --quick 2>&1)
}

# Runs a command with its output in LOG; every ten seconds says how far it is.
_setup_run() {
  local log=$1 label=$2 start=$SECONDS next=$((SECONDS + 10)) process line code=0
  shift 2
  "$@" >"$log" 2>&1 </dev/null &
  process=$!
  trap 'kill "$process" 2>/dev/null; exit 130' INT TERM
  while kill -0 "$process" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS >= next)); then
      line=$(sed -nE 's/^ *((Collecting|Downloading|Processing|Building|Installing)[^:]*).*/\1/p' "$log" | tail -n 1)
      _setup_say "$label: $((SECONDS - start)) s, $(du -sh .venv 2>/dev/null | cut -f 1) on disk, ${line:-starting}"
      next=$((SECONDS + 10))
    fi
  done
  wait "$process" || code=$?
  trap - INT TERM
  if [ "$code" != 0 ]; then
    tail -n 15 "$log" >&2
    _setup_fail "$label failed with code $code; its last lines are above, the rest in $log. Fix: mend that, then run the same command again"
  fi
}

# Makes an empty .venv with the first suitable Python.
_setup_make() {
  local candidate found=''
  for candidate in python3.11 python3.12 python3 python; do
    if _setup_right_version "$candidate"; then
      found=$candidate
      "$candidate" -c 'import ensurepip, venv' 2>/dev/null && break
      candidate=''
    fi
  done
  [ -n "$found" ] || _setup_fail "python: expected Python 3.11 or 3.12, found none. Fix: install one, e.g. apt install python3.11 python3.11-venv"
  [ -n "$candidate" ] || _setup_fail "$found: expected its venv module, found none. Fix: install it, e.g. apt install $found-venv"
  _setup_say "making .venv with $("$candidate" --version), then installing requirements.txt: some minutes, once"
  rm -rf .venv
  mkdir .venv
  : >.venv/.building
  _setup_run .venv/install.log "making .venv" "$candidate" -m venv .venv
}

# Brings .venv to requirements.txt; everything is imported once before it counts as complete.
_setup_install() {
  local start=$SECONDS
  : >.venv/.building
  rm -f .venv/.complete
  _setup_run .venv/install.log installing .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt
  _setup_run .venv/check.log "importing the packages" .venv/bin/python utils/check_env.py
  printf '%s\n' "$1" >.venv/.complete
  rm .venv/.building
  _setup_say ".venv is complete after $((SECONDS - start)) s"
}

# One run at a time: a second one waits for the first.
_setup_lock() {
  local owner
  until mkdir .venv.tmp 2>/dev/null; do
    owner=$(cat .venv.tmp/pid 2>/dev/null || true)
    if [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null; then
      rm -rf .venv.tmp # its run was killed
      continue
    fi
    _setup_say "waiting for process ${owner:-unknown}, which makes .venv; if there is none, remove .venv.tmp"
    sleep 5
  done
  echo "$BASHPID" >.venv.tmp/pid
  trap 'rm -rf .venv.tmp' EXIT
}

_setup_update() {
  local stamp=$1 old
  _setup_lock
  old=$(cat .venv/.complete 2>/dev/null || true)
  if [ "$old" = "$stamp" ]; then return; fi # another run has just made it
  if [ -x .venv/bin/python ] && [ -n "$old" ] && [ "${old#* }" = "${stamp#* }" ]; then
    _setup_say "requirements.txt has changed: bringing .venv up to date"
  elif [ -f .venv/pyvenv.cfg ] && [ -z "$old" ] && [ ! -f .venv/.building ]; then
    _setup_say "checking the .venv that you made"
    .venv/bin/python utils/check_env.py >&2 || _setup_fail ".venv: expected the pinned packages, found the above. Fix: install them, or remove .venv so that it is made for you"
    printf '%s\n' "$stamp" >.venv/.complete
    return
  else
    [ ! -e .venv ] || _setup_say ".venv is not complete, or was made in another folder: starting again"
    _setup_make
  fi
  _setup_install "$stamp"
}

_setup_env() {
  local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} stamp
  if [ "$active" != "$repo_root/.venv" ] && [[ -n $active || ! -f .venv/.complete ]]; then
    if _setup_suitable; then return; fi
    [ -z "$active" ] || _setup_say "the active environment $active is not used, .venv is: ${_setup_reason##*$'\n'}"
  fi
  stamp="$({ sha256sum requirements.txt 2>/dev/null || shasum -a 256 requirements.txt; } | cut -c 1-64) $repo_root/.venv"
  if [ ! -x .venv/bin/python ] || [ "$(cat .venv/.complete 2>/dev/null || true)" != "$stamp" ]; then
    (_setup_update "$stamp")
  fi
  export VIRTUAL_ENV="$repo_root/.venv" PATH="$repo_root/.venv/bin:$PATH"
}

_setup_env

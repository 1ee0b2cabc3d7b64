# Goes to the repository's root and makes its Python importable. Source it by hand from anywhere, or from a script:
#   . /where/it/is/path.sh
# It sets repo_root and caller_dir (where you stood), and uses .venv when ./run.sh has made one and no environment is active.

caller_dir=$PWD
repo_root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")" && pwd -P)
cd -- "$repo_root" || return

case ":${PYTHONPATH:-}:" in
  *":$repo_root:"*) ;;
  *) export PYTHONPATH="$repo_root${PYTHONPATH:+:$PYTHONPATH}" ;;
esac
export PYTHONUTF8=1 # transcripts are UTF-8, whatever the locale says

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f .venv/.complete ]; then
  export VIRTUAL_ENV="$repo_root/.venv" PATH="$repo_root/.venv/bin:$PATH"
fi

# A path that the user gave from where they stood, as seen from the root: relative when it lies inside the repository.
#   caller_path PATH [new]    without `new`, a path that is not there is left as it is, and so means the repository's
caller_path() {
  local given=$1 folder
  case $given in
    "") return ;;
    /*) ;;
    *) if [ "${2:-}" = new ] || [ -e "$caller_dir/$given" ]; then given=$caller_dir/$given; fi ;;
  esac
  if [ -d "$given" ]; then
    given=$(CDPATH='' cd -- "$given" && pwd -P)
  elif folder=$(CDPATH='' cd -- "$(dirname -- "$given")" 2>/dev/null && pwd -P); then
    given=${folder%/}/$(basename -- "$given")
  fi
  printf '%s\n' "${given#"$repo_root"/}"
}

# Command-line options for a shell script. Source it below the script's plain assignments: each of them is an option.
#
#   jobs=4         # processes that work side by side
#   verbose=false  # a default of true or false makes a switch, which takes true or false
#   set=()         # a list: give the option again to add to it
#   . utils/parse_options.sh
#
# Options are `--name value` or `--name=value`, dashes for underscores; a value that begins with -- needs the second form.
# `--help` prints the comment at the top of the script, then every option with its comment and its default.
# A mistake ends the script with exit code 2. Values are only ever stored: nothing of them is run. Names that begin with _ are ours.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "expected bash 4.4 or newer, found $BASH_VERSION. Fix: install a newer bash" >&2
  exit 2
fi

# usage_error WHERE EXPECTED FOUND FIX: one line in the form of the Python programs' errors, and the end of the script.
usage_error() {
  printf '%(%H:%M:%S)T %s ERROR %s: expected %s, found %s. Fix: %s\n' -1 "$(basename "$0" .sh)" "$1" "$2" "$3" "$4" >&2
  exit 2
}

# did_you_mean NAME KNOWN...: the known name nearest to NAME (fewest changed letters, or NAME begins it); all when none is near.
did_you_mean() {
  local name=$1 best='' least=$((${#1} / 2 + 1)) known i j cost
  local -a row above
  shift
  for known in "$@"; do
    row=()
    for ((j = 0; j <= ${#known}; j++)); do row[j]=$j; done
    for ((i = 1; i <= ${#name}; i++)); do
      above=("${row[@]}")
      row[0]=$i
      for ((j = 1; j <= ${#known}; j++)); do
        cost=$((above[j - 1] + 1))
        [[ ${name:i-1:1} != "${known:j-1:1}" ]] || cost=${above[j - 1]}
        row[j]=$((above[j] + 1 < cost ? above[j] + 1 : cost))
        row[j]=$((row[j - 1] + 1 < row[j] ? row[j - 1] + 1 : row[j]))
      done
    done
    [[ -z $name || $known != "$name"* ]] || row[-1]=0
    if ((row[-1] < least)); then least=${row[-1]} best=$known; fi
  done
  if [ -n "$best" ]; then printf 'did you mean %s?' "$best"; else printf 'known are: %s' "$*"; fi
}

# Reads the assignments above line LAST of SCRIPT into _option_names, _option_comments and _option_kinds.
_find_options() {
  local script=$1 last=$2 line name number=0
  while ((++number < last)) && IFS= read -r line; do
    [[ $line =~ ^([a-z][a-z0-9_]*)=(.*)$ ]] || continue
    name=${BASH_REMATCH[1]}
    _option_names+=("$name")
    _option_comments[$name]=
    [[ $line != *" # "* ]] || _option_comments[$name]=${line#* # }
    case ${BASH_REMATCH[2]%%[[:space:]]*} in
      true | false) _option_kinds[$name]=switch ;;
      "()") _option_kinds[$name]=list ;;
      *) _option_kinds[$name]=value ;;
    esac
  done <"$script"
}

_print_help() {
  local _script=$1 _name _note
  sed -n '2,${/^#/!q;s/^# \{0,1\}//;p;}' "$_script"
  printf '\nOptions, --name VALUE or --name=VALUE:\n'
  for _name in "${_option_names[@]}"; do
    _note="default: ${!_name:-none}"
    [ "${_option_kinds[$_name]}" != list ] || _note=repeatable
    printf '  --%-14s %s (%s)\n' "${_name//_/-}" "${_option_comments[$_name]}" "$_note"
  done
  printf '  --%-14s %s\n' help "this text"
}

_parse_options() {
  local _script=$1 _last=$2 _option _name _value _count
  local -a _option_names=()
  local -A _option_comments=() _option_kinds=() _option_counts=()
  shift 2
  _find_options "$_script" "$_last"
  while (($#)); do
    _option=${1%%=*}
    case $_option in
      --help | -h)
        _print_help "$_script"
        exit 0
        ;;
      --*) ;;
      *) usage_error "$1" "an option" "'$1'" "give it as the value of an option; --help lists them all" ;;
    esac
    _name=${_option#--}
    _name=${_name//-/_}
    if [ -z "${_option_kinds[${_name:-none}]:-}" ]; then
      usage_error "$_option" "a known option" "'${_option#--}'" "$(did_you_mean "$_option" "${_option_names[@]/#/--}" | tr _ -)"
    fi
    if [[ $1 == *=* ]]; then
      _value=${1#*=}
      shift
    elif (($# < 2)) || [[ $2 == --* ]]; then
      usage_error "$_option" "a value" "${2:-nothing}" "$_option VALUE, or $_option=VALUE"
    else
      _value=$2
      shift 2
    fi
    case ${_option_kinds[$_name]} in
      switch) [[ $_value == true || $_value == false ]] || usage_error "$_option" "true or false" "'$_value'" "$_option true" ;;
      list)
        _count=${_option_counts[$_name]:-0}
        _option_counts[$_name]=$((_count + 1))
        _name="${_name}[$_count]"
        ;;
    esac
    printf -v "$_name" %s "$_value"
  done
}

_parse_options "${BASH_SOURCE[1]}" "${BASH_LINENO[0]}" "$@"

# Numbered stages for a shell script. Source it after utils/parse_options.sh; it uses the options stage, stop_stage and only.
#
#   if stage 3 pretrain "what it does"; then
#     commands                  # the first that fails ends the script, with its exit code
#   fi
#   end_stages
#
# The stages that exist are read from the script's own `if stage N` lines.

_stage_say() { printf '%(%H:%M:%S)T %s %s\n' -1 "$(basename "$0" .sh)" "$*" >&2; }

# Checks the options, and keeps what the last line of a failed run needs: the script and the user's own arguments, which are
# the last RUN_USER_ARGS of them when the script was started again by way of egs/.
_stage_begin() {
  local script=$1 option value
  shift
  _stage_script=./$(basename "$script")
  [ "$(dirname "$script")" -ef . ] || _stage_script=$(CDPATH='' cd -- "$(dirname -- "$script")" && pwd)/$(basename "$script")
  _stage_args=("${@:$# - ${RUN_USER_ARGS:-$#} + 1}")
  unset RUN_USER_ARGS
  _stage_number='' _stage_name='' _stage_start=0
  mapfile -t _stage_known < <(sed -n 's/^if stage \([0-9][0-9]*\) .*/\1/p' "$script")
  for option in stage stop_stage only; do
    value=${!option}
    [[ $value =~ ^[0-9]+$ || ($option == only && -z $value) ]] || usage_error "--${option//_/-}" "the number of a stage" "'$value'" "one of ${_stage_known[*]}"
  done
  for value in $only $stage; do
    [[ " ${_stage_known[*]} " == *" $value "* ]] || usage_error "--stage $value" "a stage that exists" "$value" "one of ${_stage_known[*]}"
  done
  ((stop_stage >= stage)) || [ -n "$only" ] || usage_error "--stop-stage" "a number from --stage $stage on" "$stop_stage" "--stop-stage $stage, or --only $stop_stage"
  if [ -n "$only" ]; then stage=$only stop_stage=$only; fi
  trap '_stage_exit $?' EXIT
}

# stage_selected N: whether this run includes stage N.
stage_selected() { (($1 >= stage && $1 <= stop_stage)); }

# stage N NAME PURPOSE: whether to run it; if so, its first line is printed.
stage() {
  end_stages
  stage_selected "$1" || return 1
  _stage_number=$1 _stage_name=$2 _stage_start=$SECONDS
  _stage_say "stage $1 $2: $3"
}

# Prints the seconds of the stage before; call it once below the last stage.
end_stages() {
  [ -z "$_stage_number" ] || _stage_say "stage $_stage_number $_stage_name: done in $((SECONDS - _stage_start)) s"
  _stage_number=''
}

_stage_exit() {
  local code=$1 command argument only_given=false
  if [ -z "$_stage_number" ] || [ "$code" = 0 ]; then return; fi
  command=$(printf %q "$_stage_script")
  set -- "${_stage_args[@]}"
  while (($#)); do
    case $1 in
      --only | --only=*) only_given=true ;;&
      --stage) shift ;; # the value goes too: the new one is put in below
      --stage=*) ;;
      *) command+=" $(printf %q "$1")" ;;
    esac
    shift
  done
  [ "$only_given" = true ] || command+=" --stage $_stage_number"
  _stage_say "ERROR stage $_stage_number $_stage_name: failed with code $code after $((SECONDS - _stage_start)) s. Go on with: $command"
}

_stage_begin "${BASH_SOURCE[1]}" "$@"

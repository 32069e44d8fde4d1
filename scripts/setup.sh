# Read by the other scripts (`extra=NAME; . scripts/setup.sh`) from the root of the repository:
# puts flowvi with an extra, in the versions of constraints.txt, into a virtual environment.
#
# That is the active one if there is one, else .venv, made by $PYTHON (python3.11, or python3).
# Nothing is done when the environment is up to date.

if [ -n "${VIRTUAL_ENV:-}" ]; then
    venv=$VIRTUAL_ENV
else
    venv=$PWD/.venv
fi

if [ ! -x "$venv/bin/pip" ]; then
    if [ -z "${PYTHON:-}" ]; then
        PYTHON=$(command -v python3.11 || command -v python3 || true)
    fi
    if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "flowvi needs Python 3.11 or newer; name one, as in PYTHON=/path/to/python3.11." >&2
        exit 1
    fi
    "$PYTHON" -m venv "$venv"
fi

# The environment is up to date if it was set up for this extra from the same files.
stamp=$venv/flowvi-$extra
state="$PWD $(cat constraints.txt setup.cfg pyproject.toml | cksum)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$state" ]; then
    echo "Installing flowvi[$extra] into $venv" >&2
    "$venv/bin/python" -m pip install --quiet -c constraints.txt setuptools torch
    # The build uses the setuptools that was just installed.
    "$venv/bin/python" -m pip install --quiet -c constraints.txt --no-build-isolation \
        -e ".[$extra]"
    echo "$state" >"$stamp"
fi

PATH=$venv/bin:$PATH
export PATH

#!/bin/sh
# Tests that need nothing but torch, pandas and a few small packages, with one Python and one torch, in an environment that is
# kept in $ENVIRONMENTS (build/versions by default): versions.sh 3.10 2.8.0, or with "short" behind it for a few of them.
set -e
environment=${ENVIRONMENTS:-build/versions}/python$1-torch$2
not_run() {
    echo "torch $2 was not tested: $3"
    exit 0
}
python=""
for found in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if "$found" --version > /dev/null 2>&1; then
        python=$found
        break
    fi
done
test -n "$python" || not_run "$1" "$2" "there is no Python $1 on this machine"
if ! test -e "$environment/.ready"; then
    mkdir -p "$environment"
    # Released wheels for Linux bring a GPU's libraries: about 6 GB, and as much room again while they are unpacked.
    if test "$(df -Pk "$environment" | awk 'NR == 2 { print $4 }')" -lt $((8 * 1024 * 1024)); then
        rm -rf "$environment"
        not_run "$1" "$2" "its environment needs 8 GB, which are not free in $(dirname "$environment")"
    fi
    "$python" -m venv "$environment"
    if ! "$environment/bin/python" -m pip install --quiet --no-cache-dir "torch==$2"; then
        rm -rf "$environment"
        not_run "$1" "$2" "no wheel of it for Python $1 is to be had here"
    fi
    touch "$environment/.ready"
fi
"$environment/bin/python" -m pip install --quiet --no-cache-dir numpy pandas pytest hypothesis safetensors jinja2 scipy tqdm
echo "Python $1, torch $2"
if test "$3" = short; then
    tests="tests/autograd tests/rules tests/graph tests/traps tests/approximations/test_hessian_trace.py"
else
    tests="tests/monitor tests/traps tests/test_properties.py tests/test_fisher_report.py tests/test_errors.py
        tests/test_verification.py tests/test_statistics.py tests/test_results.py tests/test_likelihoods.py
        tests/test_report.py tests/autograd tests/batch_axis tests/rules tests/graph tests/per_sample tests/faults
        tests/approximations/test_fisher_trace.py tests/approximations/test_hessian_trace.py"
fi
# shellcheck disable=SC2086  # the names of the files have no spaces
PYTHONPATH=src "$environment/bin/python" -m pytest -q -p no:cacheprovider $tests
echo "tested: Python $1, torch $2"

# Sourced by quickstart and test: finds a Python, makes the virtual environment, installs when pyproject.toml changed.
# Needs: root (the repository), wanted ("" or "3.11" or "3.12"). Sets: venv, python.
# apart, where it is set, is added to the environment's name.

stop() {
    echo "${0##*/}: $1" >&2
    exit 1
}

# Whether $1 runs and is a Python that the package supports. Asked by running it: a pyenv shim may have nothing behind it.
supported() {
    "$1" -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(v not in ("3.11", "3.12") or sys.argv[1] not in ("", v))' "$wanted" >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[12]*/bin/python3; do
        if supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    stop "needs Python ${wanted:-3.11 or 3.12}; found $(python3 --version 2>&1 | head -n 1 || echo none). Install it, or put it on PATH."
}

# free_disk MEGABYTES
free_disk() {
    local free
    free=$(df -Pm "$root" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$1" ] || stop "needs $1 MB of free disk under $root to install, $free MB are free."
}

digest() {
    "$python" -c 'import hashlib, sys; h = hashlib.sha256(open(sys.argv[1], "rb").read()); h.update(sys.argv[2].encode()); print(h.hexdigest())' "$root/pyproject.toml" "$root"
}

# environment EXTRA MEGABYTES COVERED...: makes $venv with the package and EXTRA ("" for none) in it.
# COVERED are the extras that EXTRA includes, so that the scripts can share one environment.
environment() {
    local extra=$1 need=$2 base log
    shift 2
    case $wanted in
        "" | 3.11 | 3.12) ;;
        *) stop "--python $wanted: needs 3.11 or 3.12." ;;
    esac
    venv="$root/.venv"
    [ "$wanted" = 3.12 ] && venv="$root/.venv-3.12"
    venv=$venv${apart:-}
    python="$venv/bin/python"
    if [ -e "$venv" ] && ! supported "$python" && "$python" -c '' >/dev/null 2>&1; then
        stop "$venv holds $("$python" --version 2>&1), needed is Python ${wanted:-3.11 or 3.12}: move it away and start again."
    fi
    if [ -e "$venv" ] && ! supported "$python"; then
        rm -rf "$venv" # the Python that it was made with is gone
    elif [ -e "$venv" ] && [ ! -e "$venv/.installed-" ] && ! "$python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$venv" # its making was stopped half way
    fi
    if [ ! -e "$venv" ]; then
        base=$(find_python) || exit 1
        free_disk "$need"
        echo "making ${venv##*/} with $("$base" --version)"
        if ! "$base" -m venv "$venv" >/dev/null 2>&1; then
            rm -rf "$venv"
            stop "$base cannot make virtual environments: install its venv module (Debian: python3-venv)."
        fi
    fi
    if [ "$(cat "$venv/.installed-$extra" 2>/dev/null)" != "$(digest)" ]; then
        [ -e "$venv/.installed-" ] || free_disk "$need"
        echo "installing dlmscope_jax${extra:+[$extra]} into ${venv##*/}; the first time takes minutes"
        log="$venv/install.log"
        if ! "$python" -m pip install --quiet --disable-pip-version-check --editable "$root${extra:+[$extra]}" >"$log" 2>&1; then
            grep -qi 'no space left' "$log" && stop "the disk is full; free $need MB under $root."
            grep -qiE 'connection|timed out|resolve|network|proxy' "$log" && stop "pip could not reach the package index (network or proxy?); its words are in $log."
            stop "pip failed: $(grep -m 1 '^ERROR' "$log" || tail -n 1 "$log") (all of it: $log)"
        fi
        local covered
        for covered in "$extra" "$@"; do digest >"$venv/.installed-$covered"; done
    fi
}

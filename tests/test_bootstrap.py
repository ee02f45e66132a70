"""bootstrap.sh is sourced and its functions called, against real files, real child processes and recorded answers of
nvidia-smi and pip. The installation itself is what `.ci/run` does before it comes here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from katherine.settings import PROJECT

# The first lines of nvidia-smi, the H100's in full as an H100 gave it.
H100 = """\
Sun Nov 22 11:14:11 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.159.04             Driver Version: 580.159.04     CUDA Version: 13.0     |
+-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |
|                                         |                        |               MIG M. |
|=========================================+========================+======================|
|   0  NVIDIA H100 80GB HBM3          On  |   00000000:00:06.0 Off |                    0 |
| N/A   52C    P0            134W /  700W |       0MiB /  81559MiB |      0%      Default |
|                                         |                        |             Disabled |
+-----------------------------------------+------------------------+----------------------+
"""
OLDER = "| NVIDIA-SMI 570.124.06             Driver Version: 570.124.06     CUDA Version: 12.8     |"
NEWER = "| NVIDIA-SMI 610.57.04              KMD Version: 610.57.04     CUDA UMD Version: 13.3     |"
WITHOUT_CUDA = "| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: N/A      |"
LISTED = """\
torch (2.15.0)
Available versions: 2.15.0, 2.14.1, 2.13.0+cpu, 2.13.0, 2.12.1
  INSTALLED: 2.13.0+cpu
  LATEST:    2.15.0
"""


def bash(script: str, *, stdin: str = "", folder: Path = PROJECT, **environment: str) -> subprocess.CompletedProcess:
    """`script` after bootstrap.sh of `folder` was sourced, ending as the real one ends."""
    return subprocess.run(
        ["bash", "-c", f"source ./bootstrap.sh; trap on_exit EXIT\n{script}"],
        cwd=folder,
        input=stdin,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("answer", "cuda"), [(H100, "13.0"), (OLDER, "12.8"), (NEWER, "13.3"), (WITHOUT_CUDA, ""), ("", "")]
)
def test_the_drivers_cuda_is_read_from_every_layout(answer, cuda):
    assert bash("driver_cuda", stdin=answer).stdout.strip() == cuda


@pytest.mark.parametrize(
    ("cuda", "capabilities", "backend"),
    [
        ("13.0", "9.0", "cu130"),
        ("13.3", "12.0", "cu130"),
        ("12.8", "9.0", "cu126"),
        ("12.6", "8.9", "cu126"),
        ("13.0", "7.0", "cu126"),  # CUDA 13 no longer knows a V100
        ("13.0", "7.5 12.0", "cu130"),
    ],
)
def test_torchs_build_fits_driver_and_card(cuda, capabilities, backend):
    assert bash(f"choose_backend {cuda} {capabilities}; echo $backend").stdout.strip() == backend


@pytest.mark.parametrize(
    ("cuda", "capabilities", "remedy"),
    [
        ("12.4", "9.0", "choose a host with CUDA 12.6 or newer"),
        ("12.8", "12.0", "choose a host with CUDA 13.0 or newer"),
        ("13.0", "6.1", "choose a host with a newer GPU"),
    ],
)
def test_where_no_build_fits_it_stops_and_says_which_host_to_choose(cuda, capabilities, remedy):
    ended = bash(f"choose_backend {cuda} {capabilities}; echo went on")
    assert ended.returncode == 1
    assert "went on" not in ended.stdout
    assert remedy in ended.stderr


def test_a_gpu_is_examined_through_nvidia_smi_and_an_old_nvcc_is_not_used_for_a_new_card(tmp_path):
    program(tmp_path, "nvidia-smi", f"case $* in *compute_cap*) echo 9.0 ;; *) cat <<'SAID'\n{H100}SAID\n;; esac")
    show = 'examine_gpu; echo "$backend/$architectures/$llama_cuda"; llama_key'
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_HOME": str(tmp_path), "KATHERINE_CPU": ""}

    program(tmp_path, "nvcc", "case $1 in --version) echo 'tools, release 12.4, V12.4.1' ;; *) echo compute_80 ;; esac")
    without = bash(show, **environment)
    assert without.stdout.splitlines()[0] == "cu130/90/"
    assert without.stdout.splitlines()[1].endswith("-cpu")
    assert "llama.cpp is built for the CPU" in without.stderr

    program(tmp_path, "nvcc", "case $1 in --version) echo 'tools, release 12.9, V12.9.1' ;; *) echo compute_90 ;; esac")
    building = bash(show, **environment)
    assert building.stdout.splitlines()[0] == "cu130/90/12.9"
    assert building.stdout.splitlines()[1].endswith("-cuda-90-12.9")


def test_a_driver_that_gives_no_cuda_stops_the_set_up(tmp_path):
    program(tmp_path, "nvidia-smi", f"echo '{WITHOUT_CUDA}'")
    ended = bash("examine_gpu", PATH=f"{tmp_path}:{os.environ['PATH']}", KATHERINE_CPU="")
    assert ended.returncode == 1
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in ended.stderr


@pytest.mark.parametrize(
    ("backend", "listed", "requirement"),
    [
        ("cpu", LISTED, "torch==2.13.0+cpu"),
        ("cpu", LISTED.replace("+cpu", ""), ""),  # the plain build is CUDA's: uv is asked for the other
        ("cu130", LISTED, "torch===2.13.0"),
        ("cu126", LISTED, ""),
        ("cu126", LISTED.replace("+cpu", "+cu126"), "torch==2.13.0+cu126"),
    ],
)
def test_pip_is_asked_for_a_build_only_where_it_lists_it(backend, listed, requirement):
    assert bash(f"offered_torch {backend}", stdin=listed).stdout.strip() == requirement


def test_a_python_that_is_found_but_does_not_run_is_passed_over(tmp_path):
    for broken in ("python3.12", "python3.11"):
        program(tmp_path, broken, "echo 'pyenv: command not found' >&2; exit 127")
    program(tmp_path, "python3", f'exec {sys.executable} "$@"')
    ended = bash("find_python; echo $base_python", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert ended.stdout.strip() == sys.executable


def test_a_python_without_its_venv_module_names_the_package(tmp_path):
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in ("python3.12", "python3.11", "python3"):
        program(tmp_path, name, f'[[ $* != *ensurepip* ]] && exec {sys.executable} "$@"')
    ended = bash("find_python", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert ended.returncode == 1
    assert f"apt-get install python{version}-venv" in ended.stderr


def test_on_a_network_volume_the_environment_goes_to_the_local_cache(tmp_path):
    mounted = 'stat() { case ${*: -1} in "$project"*) echo fuseblk ;; *) echo ext2/ext3 ;; esac; }\n'
    place = bash(f"{mounted}environment_place", XDG_CACHE_HOME=str(tmp_path)).stdout.strip()
    assert re.fullmatch(rf"{tmp_path}/katherine/venv-[0-9a-f]{{12}}", place)
    everywhere = bash("stat() { echo fuseblk; }\nenvironment_place", XDG_CACHE_HOME=str(tmp_path)).stdout.strip()
    assert everywhere == f"{PROJECT}/.venv"


def test_a_failing_step_is_named_with_its_last_lines_and_the_remedy(tmp_path):
    script = 'mkdir -p "$cache"; run "brewing tea" "buy leaves" bash -c "echo no leaves; exit 3"; echo went on'
    ended = bash(script, KATHERINE_HOME=str(tmp_path))
    assert ended.returncode == 3
    assert "went on" not in ended.stdout
    for said in ("failed (status 3): brewing tea", "    no leaves", "remedy: buy leaves"):
        assert said in ended.stderr


@pytest.fixture
def finished(tmp_path):
    """A project folder whose set-up is finished, as the stamp says, around an environment that runs."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("bootstrap.sh", "requirements.txt", "requirements-cuda.txt"):
        shutil.copy(PROJECT / name, project)
    (project / "app.py").write_text("import sys; print(sys.prefix, sys.argv[1:])")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    home = project / "home"
    version = re.search(r"^LLAMA_VERSION=(.*)$", (project / "bootstrap.sh").read_text(), re.M)[1]
    (home / "cache" / f"llama.cpp-{version}").mkdir(parents=True)
    (home / "cache" / f"llama.cpp-{version}" / "convert_hf_to_gguf.py").touch()
    stamp = bash("stamp", folder=project, KATHERINE_HOME=str(home), KATHERINE_CPU="1").stdout
    (project / ".venv" / "katherine.stamp").write_text(stamp)
    return project


def test_the_second_run_installs_nothing_and_hands_over(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    environment = os.environ | {"KATHERINE_HOME": str(finished / "home"), "KATHERINE_CPU": "1"}
    command = ["bash", str(finished / "bootstrap.sh"), "demo", "--json"]
    ended = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=60)
    assert ended.stdout == f"{finished}/.venv ['demo', '--json']\n"
    assert "installing" not in ended.stderr
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_without_a_word_it_ends_in_serving(finished):
    environment = os.environ | {"KATHERINE_HOME": str(finished / "home"), "KATHERINE_CPU": "1"}
    command = ["bash", str(finished / "bootstrap.sh")]
    ended = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=60)
    assert ended.stdout == f"{finished}/.venv ['serve']\n"


# What stands for the search: it finds a Chromium once apt-get has brought one that runs.
SEARCH = "find_browser() { if [[ -e $KATHERINE_HOME/runs ]]; then echo /usr/bin/chromium; else echo none; false; fi; }"


@pytest.mark.parametrize(
    ("apt_get", "required", "status", "said"),
    [
        ("touch $KATHERINE_HOME/runs", "required", 0, "installing chromium"),
        ("true", "", 0, "none: the tests marked 'browser' are left out"),  # Ubuntu's stub: installed, and does not run
        ("exit 100", "", 0, "apt-get could not"),
        ("exit 100", "required", 1, "stopped: none"),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="packages are installed by root alone")
def test_a_browser_is_brought_by_the_system_or_what_is_left_out_is_said(tmp_path, apt_get, required, status, said):
    program(tmp_path / "bin", "apt-get", apt_get)
    script = f"{SEARCH}\nlog=/dev/null; bring_browser; echo went on"
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    ended = bash(script, PATH=path, KATHERINE_HOME=str(tmp_path), KATHERINE_BROWSER=required)
    assert ended.returncode == status
    assert said in ended.stderr
    assert ("went on" in ended.stdout) == (status == 0)


@pytest.mark.parametrize(
    "change",
    [
        "echo extra==1.0 >>requirements.txt",
        "rm home/cache/llama.cpp-*/convert_hf_to_gguf.py",
        "rm .venv/bin/python3* .venv/bin/python",
        "rm .venv/katherine.stamp",
    ],
)
def test_a_change_makes_the_next_run_install_again(finished, change):
    ask = 'place=$project/.venv python=$project/.venv/bin/python; if installed; then echo "nothing to do"; fi'
    environment = {"folder": finished, "KATHERINE_HOME": str(finished / "home")}
    assert bash(ask, **environment).stdout.strip() == "nothing to do"
    assert bash(f"{change}\n{ask}", **environment).stdout == ""


@pytest.mark.parametrize(("status", "busy"), [(1, False), (137, True)])
def test_an_installation_that_was_killed_leaves_its_mark_and_one_that_failed_does_not(finished, status, busy):
    script = f'place=$project/.venv work=$place/work; touch "$place/katherine.busy"; run pip "" bash -c "exit {status}"'
    ended = bash(script, folder=finished, KATHERINE_HOME=str(finished / "home"))
    assert ended.returncode == status
    assert (finished / ".venv" / "katherine.busy").exists() == busy


def test_an_installation_that_was_killed_starts_again_from_a_clean_environment(finished, tmp_path):
    environment = finished / ".venv"
    (environment / "katherine.backend").write_text("cpu\n")
    for left in ("katherine.busy", "half-a-package"):
        (environment / left).touch()
    program(tmp_path / "bin", "python3", f'exec {sys.executable} "$@"')
    script = 'place=$project/.venv python=$project/.venv/bin/python; make_environment; "$python" -m pip --version'
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    ended = bash(script, folder=finished, KATHERINE_HOME=str(finished / "home"), PATH=path)
    assert ended.returncode == 0, ended.stderr
    assert str(environment) in ended.stdout
    assert not (environment / "half-a-package").exists()
    assert (environment / "katherine.backend").read_text() == "cpu\n"


def test_an_environment_that_somebody_else_made_is_left_alone(finished):
    ended = bash("place=$project/.venv python=false; make_environment", folder=finished)
    assert ended.returncode == 1
    assert "was not made by this script" in ended.stderr
    assert (finished / ".venv" / "pyvenv.cfg").is_file()


def test_the_scripts_own_pins_are_those_of_the_requirements():
    requirements = (PROJECT / "requirements.txt").read_text().splitlines()
    torch, llama = bash('echo "$TORCH"; echo "$LLAMA_VERSION"').stdout.split()
    assert f"torch=={torch}" in requirements
    assert f"llama-cpp-python[server]=={llama}" in requirements


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = [PROJECT / "bootstrap.sh", PROJECT / ".ci" / "run"]
    ended = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout

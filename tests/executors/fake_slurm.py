"""A cluster of one machine that understands the commands that submitit gives to SLURM.

`install` writes sbatch, srun, sacct, scancel and scontrol into a folder for the PATH. Jobs are started for
real, from the script that submitit wrote, so many of an array at once as it asks for; one that asked to be
put into the queue again is started again. A job's state lies in a file, as PENDING, RUNNING, COMPLETED, ….
The step of a job, which srun starts, is a process that has torch already (`tests.warm`).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests import warm

#: what the commands are called by, wherever they are
MODULE = "tests.executors.fake_slurm"
COMMANDS = ("sbatch", "srun", "sacct", "scancel", "scontrol")


def install(folder: Path) -> dict[str, str]:
    """Write the commands; the environment variables with which they are found.

    Jobs can be started only once the server of `tests.warm` was.
    """
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for command in COMMANDS:
        file = folder / "bin" / command
        call = f'PYTHONPATH="{warm.ROOT}" exec "{sys.executable}" -m {MODULE} {command}'
        file.write_text(f'#!/bin/sh\n{call} "$@"\n')
        file.chmod(0o755)
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def jobs() -> Path:
    return Path(os.environ["FAKE_SLURM"]) / "jobs"


def submissions() -> int:
    """How often sbatch was called."""
    return len(list(jobs().glob("*.script")))


def states() -> dict[str, str]:
    return {file.stem: file.read_text() for file in sorted(jobs().glob("*.state"))}


def kill(job: str) -> None:
    """Kill whatever is of a job."""
    os.kill(_pid(job, "step"), signal.SIGKILL)
    os.killpg(_pid(job, "shell"), signal.SIGKILL)


def _pid(job: str, of: str) -> int:
    return int((jobs() / f"{job}.{of}").read_text())


def sbatch(script: str) -> None:
    number = str(1000 + submissions())
    content = Path(script).read_text()
    (jobs() / f"{number}.script").write_text(content)
    array = re.search(r"--array=0-(\d+)%(\d+)", content)
    last, at_once = (int(array[1]), int(array[2])) if array else (0, 1)
    for task in range(last + 1):
        name = f"{number}_{task}" if array else number
        (jobs() / f"{name}.state").write_text("PENDING")
    tasks = str(last + 1 if array else 0)
    command = [sys.executable, "-m", MODULE, "daemon", number, tasks, str(at_once)]
    with open(os.devnull, "w") as nowhere:
        subprocess.Popen(command, start_new_session=True, stdout=nowhere, stderr=nowhere)
    print(f"Submitted batch job {number}")


def daemon(number: str, tasks: str, at_once: str) -> None:
    """What SLURM's own processes do for a job or an array."""
    waiting = [f"{number}_{task}" for task in range(int(tasks))] or [number]
    running: dict[str, subprocess.Popen[bytes]] = {}
    while waiting or running:
        while waiting and len(running) < int(at_once):
            name = waiting.pop(0)
            running[name] = launched(name, number)
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if (jobs() / f"{name}.requeue").is_file():
                    (jobs() / f"{name}.requeue").unlink()
                    told(name, "PENDING")
                    waiting.append(name)
                else:
                    told(name, "COMPLETED" if process.returncode == 0 else "FAILED")
        time.sleep(0.05)


def launched(name: str, number: str) -> subprocess.Popen[bytes]:
    variables = {**os.environ, "SLURM_JOB_ID": number, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    if "_" in name:
        variables |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": name.partition("_")[2]}
    script = str(jobs() / f"{number}.script")
    process = subprocess.Popen(["bash", script], env=variables, start_new_session=True)
    (jobs() / f"{name}.shell").write_text(str(process.pid))
    told(name, "RUNNING")
    return process


def told(name: str, state: str) -> None:
    temporary = jobs() / f"{name}.new"
    temporary.write_text(state)
    temporary.replace(jobs() / f"{name}.state")


def srun(*arguments: str) -> None:
    rest = list(arguments)
    streams = {}
    while rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            streams[option] = rest.pop(0)
    number, task = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_TASK_ID", "")
    handles = []
    for option in ("--output", "--error"):
        name = streams[option].replace("%A", number).replace("%a", task).replace("%j", number)
        handles.append(os.open(name.replace("%t", "0"), os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    # the command is: python -u -m submitit.core._submit FOLDER
    _, _, _, module, *arguments = rest
    request = {
        "module": module,
        "arguments": arguments,
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
    }
    step = warm.Command(request, handles)
    job = f"{number}_{task}" if task else number
    (jobs() / f"{job}.step").write_text(str(step.pid))
    code = step.wait()
    sys.exit(code if code >= 0 else 128 - code)


def sacct(*arguments: str) -> None:
    asked = {arguments[i + 1] for i, word in enumerate(arguments) if word == "-j"}
    print("JobID|State|NodeList")
    for name, state in states().items():
        if name.partition("_")[0] in asked:
            print(f"{name}|{state}|here")


def scancel(name: str, option: str = "", number: str = "SIGTERM") -> None:
    """`scancel JOB [--signal SIGNAL]`: to the job's step, and not to the shell that started it."""
    os.kill(_pid(name, "step"), getattr(signal, number))


def scontrol(verb: str, name: str) -> None:
    assert verb == "requeue"
    (jobs() / f"{name}.requeue").touch()


if __name__ == "__main__":
    called, *rest = sys.argv[1:]
    globals()[called](*rest)

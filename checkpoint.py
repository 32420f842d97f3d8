"""The files of a run: its folder, its checkpoints, and what its log says of the machine.

Nothing here knows how a model is trained: `run` in train.py says what is saved, and when.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import zipfile

import torch
import torchvision

from config import flag_of
from datasets import InputError
from model import build_model


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def out_of_memory(error):
    """Whether the error says that memory ran out. For a CPU's, torch raises a plain RuntimeError; some are wrapped."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error)
            or "can't allocate memory" in str(error))


def save(content, path):
    """torch.save that leaves either the old file or the new one, whatever happens. InputError if the disk is full."""
    try:
        with open(path + ".new", "wb") as file:
            torch.save(content, file)
            os.fsync(file.fileno())  # on the disk before the name changes, in case the power fails
        os.replace(path + ".new", path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        if os.path.exists(path + ".new"):
            os.remove(path + ".new")
        if out_of_memory(error):
            raise
        raise InputError(f"cannot write {path} ({str(error).splitlines()[0]}): the disk may be full; make room, and go "
                         "on with --resume") from None


def append_line(path, values):
    """Add a dict to a log of JSON lines. It is on the disk before the checkpoint that follows it."""
    with open(path, "a") as file:
        file.write(json.dumps(values) + "\n")
        file.flush()
        os.fsync(file.fileno())


def load(path, advice="; a run's model.pt comes back if you delete it and give the run's command with --resume"):
    """What `save` wrote, on the CPU; only tensors and plain values, never code. InputError if missing or not whole.

    advice: is added to the sentence about a file that is not whole.
    """
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch.load does not look at the check sums
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InputError(f"cannot read {path} ({error.strerror}): name a file that train.py wrote, such as "
                         "runs/NAME/model.pt") from None
    except Exception as error:  # a damaged file can raise almost anything
        if out_of_memory(error):
            raise
        content = None
    if not isinstance(content, dict):
        raise InputError(f"cannot read {path}: it is damaged, or not a checkpoint of this project{advice}")
    return content


def load_model(path, device="cpu"):
    """A model.pt that train.py wrote, or its folder -> (the model in eval mode, the rest of the file as a dict).

    The rest: "model" and "options" (the arguments of build_model), "dataset" and "classes" (names), "hold_out" and
    "seed" (how many images were held out, and which), "step", after which it was saved, and "mean" and "std", by which
    images scaled to 0..1 are normalised: model((images - mean) / std).
    InputError if there is none, or if it is not such a file.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "model.pt")
    folder, name = os.path.split(path)
    if name == "model.pt" and not os.path.exists(path) and os.path.exists(os.path.join(folder, "last.pt")):
        raise InputError(f"there is no {path} yet: that run has not ended, finish it with --resume")
    content = load(path)
    try:
        model = build_model(content["model"], **content["options"])
        model.load_state_dict(content.pop("state_dict"))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{path} is not a model.pt of this project, or of another version of it: name the one that a "
                         "run left in its folder when it ended") from None
    about = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in content.items()}
    return model.to(device).eval(), about


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder, and going on with a run

# Fields in which a resumed run may differ from the one it goes on with.
FREE_FIELDS = ("epochs", "name", "out", "device", "compile", "data_dir", "resume", "overwrite")


def differences(was, config, free):
    """The fields, but for the free ones, in which an earlier config (a dict) differs, as "--lr 0.1 -> 0.2, ...".

    An option that is newer than that config and off, 0 or False, is no difference.
    """
    fields = [field for field in dataclasses.fields(config) if field.name not in free]
    fields = [field for field in fields if field.name in was or getattr(config, field.name)]
    return ", ".join(f"{flag_of(field)} {was.get(field.name)} -> {getattr(config, field.name)}"
                     for field in fields if was.get(field.name) != getattr(config, field.name))


def check_folder(config):
    """InputError if the run's folder is there without --resume or --overwrite, or is not there with --resume."""
    if config.resume and config.overwrite:
        raise InputError("--resume goes on with the run, --overwrite starts it again: choose one")
    if os.path.exists(config.folder) and not config.resume and not config.overwrite:
        go_on = "--resume or " if os.path.exists(os.path.join(config.folder, "last.pt")) else ""
        raise InputError(f"{config.folder} exists already: choose another --name, or {go_on}--overwrite it")
    if config.resume and not os.path.exists(config.folder):
        raise InputError(f"there is no {config.folder}/last.pt to go on from: leave --resume out")


def load_last(folder):
    """The content of the folder's last.pt. InputError if there is none, or if it is not whole or not a run's."""
    path = os.path.join(folder, "last.pt")
    if not os.path.exists(path):
        raise InputError(f"there is no {path} to go on from: give --overwrite instead of --resume")
    checkpoint = load(path, "; a run starts again with --overwrite")
    if not isinstance(checkpoint.get("config"), dict):
        raise InputError(f"{path} is not a checkpoint of this project")
    return checkpoint


LOCKS = {}  # the folders that this process writes to, each with the open file that the system unlocks when it ends


def lock(folder):
    """Keep other processes out of the folder until this one ends, however it ends. InputError if one is in there."""
    try:
        import fcntl  # not on Windows, where nothing is locked
    except ImportError:
        return
    if os.path.realpath(folder) not in LOCKS:
        number = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(number)
            raise InputError(f"another run is writing to {folder}: wait, or choose another --name") from None
        except OSError:  # a file system that cannot lock a folder, such as NFS
            os.close(number)
            return
        LOCKS[os.path.realpath(folder)] = number


def open_run(config):
    """Make the run's folder, or find it with --resume. Returns the content of last.pt, or None for a new run.

    A folder that is resumed loses the last line of its log if a full disk or a power failure has cut it short.

    InputError if it is taken or missing (see check_folder), if it cannot be written, if there is nothing to resume, or
    if the resumed run would differ.
    """
    check_folder(config)
    folder = config.folder
    log = os.path.join(folder, "log.jsonl")
    try:
        if config.resume:
            lock(folder)  # before last.pt is read: the run that writes it may be about to end
            checkpoint = load_last(folder)
            differ = differences(checkpoint["config"], config, FREE_FIELDS)
            if differ:
                raise InputError(f"{folder}/last.pt has other options ({differ}): resume it with its own")
            if os.path.exists(log):
                with open(log, "rb+") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)
            return checkpoint
        os.makedirs(folder, exist_ok=True)
        lock(folder)
        for file in ("log.jsonl", "last.pt", "last.pt.new", "model.pt", "model.pt.new"):
            if os.path.exists(os.path.join(folder, file)):
                os.remove(os.path.join(folder, file))
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another --out") from None


# ---------------------------------------------------------------------------------------------------------------------
# What the log says of the machine

def describe_machine(device):
    """The processor or GPU, and the versions that matter, as a dict."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    threads = torch.get_num_threads()
    where = "mps" if device == "mps" else f"{threads} thread{'s' if threads > 1 else ''}"
    return dict(machine=gpu or f"{cpu}, {where}", system=platform.platform(),
                python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__)


def precision_name(amp, device):
    """The precision of matrix products and convolutions, for people: what a GPU takes for float32 is TF32."""
    return amp if amp != "off" else "TF32" if device == "cuda" else "float32"


def git_commit():
    """The commit that this code is at, with "+" after it if files were changed since, or None outside a checkout."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory(device):
    """The most memory held, in bytes: on a GPU by tensors since `run` made its model, else by this process so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status") as file:  # Linux's getrusage would count in the process that started this one
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

"""The README: its commands parse, its files exist, and its numbers are those of the logs in results/."""

import json
import re
import shlex
from pathlib import Path

import distill
import show
import train

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()


def test_every_command_is_valid():
    commands = re.findall(r"python (train|distill)\.py([^\n`#&|]*)", README)
    assert len(commands) >= 10
    for script, flags in commands:
        if "--help" not in flags and "..." not in flags:
            config_class = train.Config if script == "train" else distill.Config
            train.resolve(train.parse_config(config_class, shlex.split(flags)))


def test_every_file_that_is_named_exists():
    for name in re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|md|txt|jsonl))`", README):
        assert name in ("log.jsonl",) or (ROOT / name).exists(), name


def test_the_table_of_results_is_that_of_the_logs():
    """Rows: | `command` | accuracy | n | seconds | images/s | log |"""
    rows = re.findall(r"\| `python (train\.py[^`]*)` \| ([\d.]+) % \| (\d+) s \| (\d+) \| \[log\]\((\S+)\) \|", README)
    assert len(rows) >= 2
    for command, accuracy, seconds, speed, path in rows:
        log = [json.loads(line) for line in open(ROOT / path)]
        start, end = log[0], log[-1]
        assert start["config"]["model"] in command and start["data"]["name"] == "cifar10"
        assert not start["config"]["hold_out"] and log[-2]["accuracy"] == end["test_accuracy"]
        now = train.resolve(train.parse_config(argv=[*shlex.split(start["command"])[2:], "--size", "tiny"]))
        same = {name: value for name, value in vars(now).items() if name not in ("device", "size", "name")}
        assert same.items() <= start["config"].items(), f"{path} is of other presets"
        assert (accuracy, seconds, speed) == (f"{100 * end['test_accuracy']:.2f}", f"{end['seconds']:.0f}",
                                              f"{end['images_per_second']:.0f}")
        assert start["machine"].split(",")[0] in README and start["torch"].split("+")[0] in README


def test_the_generated_table_is_current():
    found = re.search(r"<!-- table -->\n(.*)<!-- end of table -->", README, re.DOTALL)[1]
    assert found.strip() == "\n".join(show.markdown_table(size) for size in ("tiny", "base")).strip()


def test_the_copied_component_runs_as_shown():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(code, "README", "exec"), {})

"""``sae-lens-scale run``: other tools' command lines."""

import sys
from pathlib import Path

import pytest
from cli.runs import Run

from sae_lens_scale.cli import main

TOOL = """
import sys
from sae_lens.registry import SAE_CLASS_REGISTRY

class Failure(Exception):
    pass

if __name__ == "__main__":
    print(__name__, sys.argv[1:], {"scale", "switch"} <= set(SAE_CLASS_REGISTRY))
    if "--fail" in sys.argv:
        raise Failure("of the tool")
    if "--exit" in sys.argv:
        sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a tool as a module and as a package, and a broken one."""
    monkeypatch.chdir(tmp_path)
    for name in ("some_tool.py", "packaged_tool/__main__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TOOL)
    (tmp_path / "broken_tool").mkdir()
    (tmp_path / "broken_tool" / "__init__.py").write_text("import missing_dependency")
    return tmp_path


@pytest.mark.parametrize("tool", ["some_tool", "packaged_tool"])
@pytest.mark.parametrize(
    "arguments",
    ["", "--help -m x --traceback --version", "a -- --b -- c", "--", "--exit 3"],
)
def test_a_tool_gets_its_arguments_and_the_architectures(
    tool: str, arguments: str, run: Run
):
    before = (sys.argv[:], sys.path[:], sys.modules["__main__"])
    status = 3 if "--exit" in arguments else 0
    out = run(f"run -m {tool} {arguments}", status).out
    assert out == f"__main__ {arguments.split()} True\n"
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before


def test_an_error_of_the_tool_keeps_its_type_and_traceback(folder: Path):
    with pytest.raises(Exception, match="of the tool") as raised:
        main(["run", "-m", "some_tool", "--fail"])
    assert raised.type.__name__ == "Failure"
    assert raised.traceback[-1].path == folder / "some_tool.py"
    with pytest.raises(ModuleNotFoundError, match="missing_dependency"):
        main(["run", "-m", "broken_tool"])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("no_such_tool", "-m: there is no module no_such_tool"),
        ("no_such.tool", "-m: there is no module no_such.tool"),
        ("some_tool.py", "-m: there is no module some_tool.py"),
        ("sae_lens.no_such", "-m: there is no module sae_lens.no_such"),
        ("sae_lens.saes", "-m: there is no module sae_lens.saes.__main__"),
        (".tool", "-m: must be an absolute name, got .tool"),
    ],
)
def test_a_module_that_is_missing_is_an_error_in_one_line(
    module: str, message: str, run: Run
):
    assert run(f"run -m {module} --x", 1).err == f"sae-lens-scale: error: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: -m"),
        (["-m"], "argument -m: must not be empty"),
        (["-m", ""], "argument -m: must not be empty"),
        (["some_tool"], "the following arguments are required: -m"),
        (["x", "-m", "some_tool"], "unrecognized arguments: x"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main(["run", *arguments])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: sae-lens-scale run -m MODULE [ARGUMENT ...]\n")
    assert message in err


def test_the_training_command_of_SAELens_has_the_architectures(run: Run):
    # On its own it says: invalid choice: 'scale'.
    tool = "sae_lens.llm_sae_training_runner"
    assert "--num_experts" in run(f"run -m {tool} --architecture scale --help").out

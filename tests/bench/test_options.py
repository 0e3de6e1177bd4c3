"""Every script of bench/ takes `--json FILE` and `--quick`; none is run here."""

import ast
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_takes_json_and_quick(name, import_bench, capsys):
    script = import_bench(name)
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0
    options = capsys.readouterr().out
    assert "--json FILE" in options
    assert "--quick" in options


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_writes_where_it_ran(name):
    """`report` writes {command, commit, hardware, versions, rows}; others put `rows` beside `provenance`."""
    tree = ast.parse((BENCH / f"{name}.py").read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert "report" in called or ("provenance" in called and "rows" in texts)

"""Results and errors as the commands print them."""

import io
import sys

import pytest

from sae_lens_scale.cli.output import complain, print_result


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", b"m\\xf6del \\u2026 \\udcff\n"),
        ("latin-1", b"m\xf6del \\u2026 \\udcff\n"),
        # Bytes of a file's name that are no text.
        ("utf-8", "mödel … \\udcff\n".encode()),
    ],
)
def test_characters_that_the_terminal_lacks_do_not_cost_the_result(
    encoding: str, printed: bytes, monkeypatch: pytest.MonkeyPatch
):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding))
    print_result("mödel … \udcff")
    assert sys.stdout.buffer.getvalue() == printed  # type: ignore[attr-defined]
    complain("mödel … \udcff")
    error = b"sae-lens-scale: error: " + printed
    assert sys.stderr.buffer.getvalue() == error  # type: ignore[attr-defined]


def test_closed_streams_are_no_error(monkeypatch: pytest.MonkeyPatch):
    # As Python has them where its caller closed them.
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    print_result("result")
    complain("error")

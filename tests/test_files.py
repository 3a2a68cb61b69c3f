"""Files: what stands in the way of writing them, and what is in them."""

from pathlib import Path

import pytest

from sae_lens_scale.files import read_json, require_writable, write_whole


def test_folders_that_cannot_be_written_into_are_refused(tmp_path: Path):
    require_writable("output", tmp_path)
    require_writable("output", tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "folder"):
        with pytest.raises(NotADirectoryError, match=f"^output: {file} is no folder"):
            require_writable("output", path)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for path in (link, link / "folder"):
        with pytest.raises(NotADirectoryError, match=f"^output: {link} is no folder"):
            require_writable("output", path)
    # Nobody may write there, whoever runs the tests.
    with pytest.raises(OSError, match="^output: nothing can be written into /proc: "):
        require_writable("output", "/proc/new")


def test_a_file_that_is_no_JSON_is_named(tmp_path: Path):
    file = tmp_path / "a.json"
    file.write_bytes('{"a": "ö"}'.encode())
    assert read_json(file) == {"a": "ö"}
    for content in (b"", b"{", b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{file} is not JSON: "):
            read_json(file)


def test_text_is_written_as_UTF8_and_what_is_no_text_is_escaped(tmp_path: Path):
    file = tmp_path / "new" / "a.csv"
    write_whole(file, "ö \udcff")
    assert file.read_bytes() == "ö \\udcff".encode()
    assert [path.name for path in file.parent.iterdir()] == ["a.csv"]

"""Text of strangers cannot act on a terminal."""

from longrl.io.one_line import one_line


def test_lines_are_joined_and_control_characters_written_as_escapes():
    assert one_line("red \x1b[31m\n\n  end\x00\u202e\u00e9") == "red \\x1b[31m end\\x00\\u202e\u00e9"


def test_a_long_text_is_cut():
    assert one_line("abcdef", 3) == "abc..."
    assert one_line("abc", 3) == "abc"

# SPDX-License-Identifier: Apache-2.0
"""Tables and texts that names of strangers are in."""

from distorch.display.tables import html_table, shortened, text_table


def test_long_texts_keep_their_ends():
    assert shortened("abcdefgh", 8) == "abcdefgh"
    assert shortened("abcdefgh", 5) == "ab…gh"
    assert len(shortened("x" * 1000, 34)) == 34


def test_a_long_name_does_not_make_a_table_wide():
    rows = [("blocks." + "x" * 1_000_000 + ".weight", "12"), ("blocks.0.weight", "3")]
    text = text_table(("name", "bytes"), rows)
    lines = text.splitlines()
    assert max(map(len, lines)) < 520
    assert lines[2].startswith("blocks.xx") and lines[2].endswith("x.weight  " + "   12")
    assert len(html_table(("name", "bytes"), rows)) < 1500


def test_names_of_an_ordinary_length_stay_whole():
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight"
    assert name in text_table(("name",), [(name,)]) and name in html_table(("name",), [(name,)])

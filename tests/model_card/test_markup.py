"""Data in Markdown, read back by a Markdown parser: the same text, and no markup in it."""

from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from nanophi.core import markup
from nanophi.model_card import card

NAMES = [
    "plain name",
    "*bold* _it_ __x__ ~~gone~~ `code` ``two``",
    "a|b \\| c \\",
    "<script>alert(1)</script> <b>x</b> &lt; &amp; <!-- hidden",
    "[link](http://evil.example) ![image](x.png) <http://auto.example>",
    "https://auto.example www.auto.example someone@auto.example",
    "# heading - item 1. item > quote",
    "$x^2$ {braces} @user",
    "ends with ` and `",
    "two\nlines\tand tabs",
]


def read(markdown: str) -> tuple[str, list[str]]:
    """Text and tags of what a Markdown parser makes of it."""
    text, tags, reader = [], [], HTMLParser()
    reader.handle_data, reader.handle_starttag = text.append, lambda tag, attrs: tags.append(tag)
    reader.handle_comment = lambda data: tags.append("comment")
    reader.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))
    reader.close()
    return "".join(text), tags


@pytest.mark.parametrize("name", NAMES)
def test_text_is_shown_as_it_is(name):
    shown = " ".join(name.split())
    for before, after in (("", ""), ("# ", ""), ("- **Name:** ", ""), ("Text about ", ", and more")):
        text, tags = read(f"{before}{markup.text(name)}{after}\n")
        assert shown in " ".join(text.split())
        assert set(tags) <= {"p", "h1", "ul", "li", "strong"}
    text, tags = read(f"| a | b |\n|---|---|\n| {markup.text(name)} | last |\n")
    assert shown in text and tags.count("td") == 2 and set(tags) <= {"table", "thead", "tbody", "tr", "th", "td"}


@pytest.mark.parametrize("name", NAMES)
def test_code_is_shown_as_it_is(name):
    text, tags = read(f"Made of {markup.code(name)}, and more\n")
    assert " ".join(name.split()) in text and tags == ["p", "code"]
    text, tags = read(f"| a | b |\n|---|---|\n| {markup.code(name, cell=True)} | last |\n")
    assert tags.count("td") == 2 and tags.count("code") == 1
    text, tags = read(markup.fenced(f"{name}\n```\n````\n</code></pre>{name}"))
    assert tags == ["pre", "code"] and text.count(name) == 2


def test_what_cannot_be_shown_is_replaced():
    assert markup.text("a\x00b\x1b[31m\u202ec\ud800d\u00a0e") == "a\ufffdb\ufffd\\[31m\ufffdc\ufffdd e"


@pytest.mark.parametrize("name", NAMES)
def test_names_of_sources_are_no_markup_in_the_card(changed, name):
    records = changed
    before = read(card.render(records).split("---\n", 2)[2])[1]
    (source,) = records["recipe.yaml"]["data"]["sources"]
    source["name"] = records["recipe.yaml"]["card"]["title"] = records["recipe.yaml"]["card"]["developers"] = name
    quality = records["quality.json"]
    quality["sources"][name] = quality["sources"].pop("topics")
    quality["scorer"]["high"] = [name]
    heldout = records["evals/heldout.json"]["nanophi"]["heldout"]["by_source"]
    heldout[name] = heldout.pop("docstrings")
    text, tags = read(card.render(records).split("---\n", 2)[2])
    assert tags == before
    assert " ".join(text.split()).count(" ".join(name.split())) >= 5

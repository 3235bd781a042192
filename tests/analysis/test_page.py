"""A report stands alone: no script, no address, all text escaped, all pictures inside and readable."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.analysis import plots
from pretrain.analysis.page import Page
from pretrain.errors import InputError

ADDRESS = re.compile(r"""(?:src\s*=|href\s*=|url\()\s*(?!["']?data:)""", re.IGNORECASE)


def pictures_of(html: str) -> list[bytes]:
    """The contents of all pictures of a page; each must be a whole PNG or SVG."""
    found = []
    for kind, data in re.findall(r'src="data:image/([a-z+]+);base64,([^"]+)"', html):
        content = base64.b64decode(data, validate=True)
        if kind == "png":
            Image.open(io.BytesIO(content)).verify()
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")
        found.append(content)
    assert len(found) == html.count("<img ")
    return found


def stands_alone(html: str) -> bool:
    return not ADDRESS.search(html) and "<script" not in html and "@import" not in html


def test_text_is_escaped_and_pictures_lie_inside():
    page = Page("a <b> & c", "why <script>?")
    page.section("One <i>", "text & more")
    page.verdict("it's <bad>", "bad")
    page.table(["x", "<y>"], [["1", "<2>"]])
    page.facts({"<name>": "<value>"})
    page.figure((plots.lines({"<c>": [1.0, 2.0]}, "x", "y"), 'alt "text"'), "<caption>")
    page.pictures(["<t>"], [[(plots.png(torch.rand(3, 4, 5)), "p")]])
    html = page.html()
    assert stands_alone(html) and len(pictures_of(html)) == 2
    assert re.findall("<(?:b|i|y|2|bad|name|value|c|caption|t|script)>", html) == []
    assert 'alt="alt &quot;text&quot;"' in html and "a &lt;b&gt; &amp; c" in html


def test_the_check_itself_finds_addresses():
    for tag in ('<img src="http://a/b.png">', "<link href='x.css'>", "url(font.woff)", "<script>1</script>"):
        assert not stands_alone(tag)


def test_plots_show_what_they_are_given_and_are_the_same_bytes_each_time():
    curves = {"ours": [1.0, 20.0, 300.0], "theirs": [3.0, 2.0, 1.0]}
    first, second = (plots.lines(curves, "block", "gain", {"limit": 2.0}, log=True) for _ in range(2))
    assert first == second
    words = "".join(ElementTree.fromstring(first).itertext())
    assert all(word in words for word in ("ours", "theirs", "block", "gain", "limit"))
    assert plots.lines({"ours": [1.0, 20.0, 301.0]}, "block", "gain") != plots.lines(
        {"ours": [1.0, 20.0, 300.0]}, "block", "gain"
    )
    for plot in (
        plots.histogram({"a": torch.ones(5)}, "norm"),
        plots.heat_map(torch.rand(3, 4), "x", "y", "%"),
    ):
        assert ElementTree.fromstring(plot).tag.endswith("svg")


def test_heat_runs_from_low_to_high():
    colours = plots.heat(torch.tensor([[0.0, 5.0, 10.0, 99.0]]), 0, 10)
    brightness = colours.sum(dim=0)[0]
    assert colours.shape == (3, 1, 4)
    assert brightness[0] < brightness[1] < brightness[2] == brightness[3]


def test_png_keeps_each_pixel():
    picture = torch.rand(3, 6, 7)
    read = torch.from_numpy(np.array(Image.open(io.BytesIO(plots.png(picture)))))
    assert torch.equal(read.permute(2, 0, 1), (picture * 255).round().byte())


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"page\.html: cannot be written"):
        Page("x").write(tmp_path / "file" / "page.html")

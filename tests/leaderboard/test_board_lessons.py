"""A README becomes a fragment that is safe and needs no network."""

import base64

import pytest

from leaderboard.lessons import picture_uri, render_lesson

SVG = "<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


def test_headings_move_below_the_pages_own_and_can_be_linked(tmp_path):
    html = render_lesson("# The idea, in *five* steps\n\n[go](#the-idea-in-five-steps)", tmp_path)
    assert '<h3 id="lesson-the-idea-in-five-steps">' in html
    assert 'href="#lesson-the-idea-in-five-steps"' in html


def test_tables_and_code_are_kept(tmp_path):
    html = render_lesson("| a | b |\n|---|---|\n| 1 | `x<y` |", tmp_path)
    assert "<td>1</td>" in html and "<code>x&lt;y</code>" in html


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "a <img src=x onerror=alert(1)>", "[x](javascript:alert(1))",
     '![x](" onerror="alert(1))', "[x](data:text/html;base64,AAAA)", "<javascript:alert(1)>"],
)  # fmt: skip
def test_nothing_in_the_text_can_run(tmp_path, text):
    html = render_lesson(text, tmp_path)
    assert "<script" not in html and "<img" not in html and 'href="' not in html


def test_pictures_of_the_directory_are_inlined(tmp_path):
    (tmp_path / "picture.svg").write_text(SVG)
    html = render_lesson("![tokens](picture.svg)", tmp_path)
    assert f'src="data:image/svg+xml;base64,{base64.b64encode(SVG.encode()).decode()}"' in html
    assert 'alt="tokens"' in html


@pytest.mark.parametrize(
    "source", ["missing.png", "../secret.png", "https://example.org/a.png", "//example.org/a.png",
               "notes.txt"],
)  # fmt: skip
def test_other_pictures_become_words(tmp_path, source):
    (tmp_path / "secret.png").write_bytes(b"x")
    directory = tmp_path / "paper"
    directory.mkdir()
    (directory / "notes.txt").write_text("x")
    html = render_lesson(f"![a picture]({source})", directory)
    assert "<img" not in html and "a picture: not part of this page" in html


def test_links_lead_to_pages_or_name_a_file(tmp_path):
    pages = {"deit": "deit.html"}
    html = render_lesson(
        "[one](../deit/README.md) [two](model.py#L10) [three](https://arxiv.org/abs/1)",
        tmp_path, pages,
    )  # fmt: skip
    assert '<a href="deit.html">one</a>' in html
    assert '<a title="model.py, L10" class="file">two</a>' in html
    assert 'href="https://arxiv.org/abs/1" rel="noopener noreferrer"' in html


def test_a_picture_must_be_small_and_inside(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"x" * 100)
    assert picture_uri(path, tmp_path).startswith("data:image/png;base64,")
    assert picture_uri(path, tmp_path / "other") is None
    monkeypatch.setattr("leaderboard.lessons.LARGEST_PICTURE", 99)
    assert picture_uri(path, tmp_path) is None

"""The whole file, read back with a parser: structure, figures with their numbers, nothing from outside, parts that are missing."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.report import read_run, report
from dlmscope_jax.report.run import Dictionary

VOID = {"meta", "input", "br", "hr", "col"}


class Node:
    """An element with its children, read by the standard parser."""

    def __init__(self, tag, attributes=()):
        self.tag, self.attributes, self.children = tag, dict(attributes), []

    def all(self, tag=None, class_=None):
        for child in self.children:
            if isinstance(child, Node):
                if (tag is None or child.tag == tag) and (class_ is None or class_ in (child.attributes.get("class") or "").split()):
                    yield child
                yield from child.all(tag, class_)

    def one(self, tag=None, class_=None, identity=None):
        return next(n for n in self.all(tag, class_) if identity is None or n.attributes.get("id") == identity)

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """Builds nodes; an element that is not closed in order is an error."""

    def __init__(self, document):
        super().__init__(convert_charrefs=True)
        self.root = Node("document")
        self.open = [self.root]
        self.feed(document)
        self.close()
        assert self.open == [self.root], f"not closed: {[n.tag for n in self.open[1:]]}"

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes), f"an attribute twice in {tag}"
        node = Node(tag, attributes)
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes {self.open[-1].tag}"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parsed(path) -> Node:
    return Tree(path.read_text(encoding="utf-8")).root


def rows_of(node: Node) -> list[list[str]]:
    return [[cell.text for cell in row.children if isinstance(cell, Node)] for row in node.all("tr")]


@pytest.fixture(scope="module")
def whole(written_run):
    return written_run, report(written_run)


@pytest.fixture(scope="module")
def page(whole):
    return parsed(whole[1])


def test_sections_stand_in_order_and_links_resolve(page):
    main = page.one("main")
    sections = [n.attributes["id"] for n in main.children if isinstance(n, Node) and n.tag == "section"]
    assert sections == ["summary", "training", "fidelity", "insertion", "latents", "generation"]
    identities = [n.attributes["id"] for n in page.all() if "id" in n.attributes]
    assert len(identities) == len(set(identities))
    links = [n.attributes["href"] for n in page.all("a")]
    assert links and all(link.startswith("#") and link[1:] in identities for link in links)


def test_nothing_comes_from_outside(page, whole):
    for node in page.all():
        assert node.tag not in ("link", "iframe", "object", "embed", "img", "base", "form")
        assert not {"src", "srcset", "xlink:href", "action", "data"} & set(node.attributes)
        assert not [name for name in node.attributes if name.startswith("on")]
    style = page.one("style").text
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    assert not re.search(
        r"https?:|\bfetch\(|XMLHttpRequest|\bimport\b *\(|WebSocket|sendBeacon|innerHTML|document\.write", whole[1].read_text()
    )


def test_policy_allows_only_the_two_scripts_that_are_there(page):
    policy = next(n.attributes["content"] for n in page.all("meta") if n.attributes.get("http-equiv") == "Content-Security-Policy")
    code = [n.text for n in page.all("script") if "type" not in n.attributes]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
    assert policy.startswith("default-src 'none';") and len(code) == 2
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_every_plot_is_described_and_has_its_numbers_in_a_table(page):
    figures = list(page.all("figure"))
    assert len(figures) > 40
    for figure in figures:
        svg = figure.one("svg", "plot")
        assert svg.attributes["role"] == "img" and len(svg.one("title").text) > 10
        cells = {cell for row in rows_of(figure.one("details")) for cell in row}
        # a mark's title ends with its numbers, after the last ": "
        marks = [title.text.rpartition(": ")[2] for title in list(svg.all("title"))[1:]]
        assert set(marks) <= cells
        assert marks or list(svg.all("polyline"))
        assert [node.text for node in svg.all("text") if "l" in (node.attributes.get("class") or "").split()], "axes are named"


def test_islands_hold_every_latent_window_and_step(page, whole):
    islands = {n.attributes["id"]: json.loads(n.text) for n in page.all("script") if n.attributes.get("type") == "application/json"}
    assert set(islands) == {f"features-{i}" for i in range(6)} | {"generation-0"}
    run = read_run(whole[0])
    for i, d in enumerate(run.dictionaries):
        data = islands[f"features-{i}"]
        assert data["name"] == d.name and len(data["latents"]) == len(d.features["records"])
        for shown, record in zip(data["latents"], d.features["records"], strict=True):
            assert shown["id"] == record["latent"] and shown["max"] == record["max_activation"]
            for w, window in zip(shown["windows"], record["windows"], strict=True):
                assert w["t"] == window["tokens"]
                assert [w["o"].get(str(j), t) for j, t in enumerate(w["t"])] == window["original"]
                assert w["a"] == pytest.approx(window["activations"], rel=5e-3)
                assert w["m"] == [j for j, m in enumerate(window["is_masked"]) if m]
                assert data["documents"][w["d"]] == window["document"]
    generation = islands["generation-0"]
    assert generation["sides"][1]["history"] == run.generations[0]["steered"]["history"]


def test_models_stand_side_by_side_in_the_fidelity_table(page, whole):
    table = next(iter(page.one("section", identity="fidelity").all("table", "fidelity")))
    first, second, *body = rows_of(table)
    assert first == ["resid_post@2, k 32", "pocket-dlmdiffusion", "pocket-dreamshifted diffusion", "pocket-arautoregressive"]
    # the visible rows of an autoregressive model are all its rows, and not shown twice
    assert second == ["all rows", "masked", "visible"] * 2 + ["all rows"]
    rows = {row[0]: row[1:] for row in body}
    sets = {d.model: d.sets for d in read_run(whole[0]).dictionaries if d.label == "resid_post@2, k 32"}
    wanted = [sets[m][s]["explained_variance"] for m in sets for s in (("all", "masked", "visible") if m != "pocket-ar" else ("all",))]
    assert [float(cell.split("[")[0]) for cell in rows["Explained variance"]] == pytest.approx(wanted, abs=5e-4)
    assert rows["Dead"] == ["2.0 %", "", "", "2.0 %", "", "", "2.0 %"]  # only of the rows that it was trained on
    assert rows["n, rows"] == ["100,352", "52,000", "48,352"] * 2 + ["100,352"]


def test_headline_takes_the_reference_rate(page):
    rows = rows_of(page.one("section", identity="summary").one("table"))
    assert [row[-1] for row in rows[1:]] == ["rate 0.45"] * 4 + ["next token"] * 2
    # 0.04 (1.2 - 0.45) for the diffusion model, 0.04 * 1.2 * 1.6 for the autoregressive one, as the run was written
    assert rows[1][4].startswith("0.0300 [") and rows[5][4].startswith("0.0768 [")


def test_insertion_by_rate_shows_dictionary_and_controls(page):
    section = page.one("section", identity="insertion")
    heads = [rows_of(figure.one("details"))[0] for figure in section.all("figure")]
    swept = [head for head in heads if head[0] == "corruption rate"]
    assert len(swept) == 4 * 3  # two layers of two diffusion models, three quantities
    assert all(head[1:] == ["dictionary", "matched noise", "untrained dictionary", "mean by mask state", "zero"] for head in swept)
    negative = [row for figure in section.all("figure") for row in rows_of(figure.one("details")) if row and row[0] == "0.95"]
    assert any(cell.startswith("−") for row in negative for cell in row), "a loss that falls is shown as such"


def test_small_losses_are_drawn_on_a_linear_axis(make_run):
    folder = make_run(latents=1, windows=1, steps=5, layers=(2,))
    notes = {}
    for factor in (1.0, 1e-3):
        for file in (folder / "results").glob("delta-loss-*.json"):
            result = json.loads(file.read_text())
            for row in result["rows"]:
                row["delta"] = {key: value * factor if key in ("value", "low", "high") else value for key, value in row["delta"].items()}
            file.write_text(json.dumps(result))
        section = parsed(report(folder)).one("section", identity="insertion")
        notes[factor] = {f.one("span", "note").text for f in section.all("figure") if f.one("strong").text == "Δloss"}
    assert notes == {1.0: {"axis linear within ±0.1, logarithmic beyond"}, 1e-3: {"linear axis"}}


def test_without_a_script_latents_and_steps_are_there(page, whole):
    run = read_run(whole[0])
    articles = list(page.all("article"))
    assert [a.one("h4").text for a in articles] == [f"Latent {r['latent']}" for d in run.dictionaries for r in d.features["records"]]
    for article, record in zip(articles, (r for d in run.dictionaries for r in d.features["records"]), strict=True):
        windows = rows_of(article.one("div", "windows"))[1:]
        assert [row[0] for row in windows] == ["top", "top", "sampled"]
        masked = sum(sum(w["is_masked"]) for w in (*record["windows"][:2], record["windows"][2]))
        assert len(list(article.one("div", "windows").all("s"))) == masked
        peak = next(b for b in article.one("div", "windows").all("b"))
        assert "--a:" in peak.attributes["style"] and float(peak.attributes["title"]) > 0
    order = rows_of(page.one("section", identity="generation").one("table", "striped"))
    assert [row[2] for row in order[1:]] == [str(s) for s in run.generations[0]["plain"]["commit_step"][3:]]
    assert [row[5] for row in order[1:]] == [str(s) for s in run.generations[0]["steered"]["commit_step"][3:]]


def test_hostile_text_stays_text(make_run, hostile):
    folder = make_run(latents=2, windows=1, length=12, layers=(2,), words=hostile)
    bad = "</script><img src=x onerror=alert(1)>"
    for file in (folder / "results").glob("*.json"):
        result = json.loads(file.read_text())
        result |= {"selection": bad, "prompt": bad, "sampler": bad, "command": bad, "device": bad, "forced": [bad]}
        for record in result.get("records", ()):
            for window in record["windows"]:
                window["document"] = bad
        file.write_text(json.dumps(result))
    (folder / "config.yaml").write_text(bad)
    path = report(folder)
    page = parsed(path)
    assert not list(page.all("img")) and not [n for n in page.all() if any(name.startswith("on") for name in n.attributes)]
    assert b"\0" not in path.read_bytes()
    data = json.loads(page.one("script", identity="features-0").text)
    assert data["documents"] == [bad]
    assert data["pieces"]["0"] == bad.replace(" ", "·") and data["pieces"]["7"] == "⟨202E⟩"
    assert bad in page.one("section", identity="summary").text and bad in page.one("section", identity="generation").text


@pytest.mark.parametrize(
    ("pattern", "section", "said"),
    [
        ("results/run.json", "summary", "no description of its models"),
        ("dictionaries/*/*/metrics.jsonl", "training", "No training curves"),
        ("dictionaries/pocket-ar/*/metrics.jsonl", "training", "without curves: pocket-ar/resid_post@2_k32"),
        ("results/fidelity-*.json", "fidelity", "Fidelity was not measured"),
        ("results/fidelity-pocket-ar-*.json", "fidelity", "Not measured for pocket-ar"),
        ("results/delta-loss-*.json", "insertion", "Insertion was not measured"),
        ("results/delta-loss-pocket-dream-2.json", "insertion", "Not measured for pocket-dream/resid_post@2_k32"),
        ("results/features-*.json", "latents", "No feature records"),
        ("results/features-pocket-ar-2.json", "latents", "No feature records for pocket-ar/resid_post@2_k32"),
        ("results/generation.json", "generation", "No steered generation"),
        ("config.yaml", "summary", "no config.yaml"),
    ],
)
def test_a_missing_part_is_said_and_the_rest_stays(make_run, pattern, section, said):
    folder = make_run(latents=1, windows=1, steps=5, layers=(2,))
    files = list(folder.glob(pattern))
    assert files
    for file in files:
        file.unlink()
    page = parsed(report(folder))
    lines = [n.text for n in page.one("section", identity=section).all("p", "missing")]
    assert any(said in line for line in lines), lines


def test_models_are_told_apart_without_a_summary(make_run):
    folder = make_run(latents=1, windows=1)
    (folder / "results" / "run.json").unlink()
    assert [(m.name, m.objective) for m in read_run(folder).models] == [
        ("pocket-dlm", "diffusion"),
        ("pocket-dream", "shifted diffusion"),
        ("pocket-ar", "autoregressive"),
    ]


def test_a_run_of_nothing_but_a_summary_is_a_page(make_run):
    folder = make_run(latents=1, windows=1)
    for file in (*(folder / "results").glob("[!r]*.json"), *folder.glob("dictionaries/*/*/metrics.jsonl")):
        file.unlink()
    assert "No dictionary was examined" in parsed(report(folder)).one("section", identity="summary").text


def test_dictionaries_are_ordered_by_model_layer_and_k(make_run):
    folder = make_run(latents=1, windows=1, layers=(10, 9))
    assert [d.name for d in read_run(folder).dictionaries][:3] == [
        "pocket-dlm/resid_post@9_k32",
        "pocket-dlm/resid_post@10_k32",
        "pocket-dream/resid_post@9_k32",
    ]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, write):
    """A run whose generation is an autoregressive one: of 12 steps the plain side ran 4, the steered side 6."""
    folder = write(tmp_path_factory.mktemp("stopped") / "made-up", latents=1, windows=1, layers=(4,))
    file = folder / "results" / "generation.json"
    result = json.loads(file.read_text()) | {"mask_id": None, "relative_size": [0.25] * 6, "dose": 1.5}
    result["pieces"] = {**result["pieces"], "0": "<pad>"}
    for key, ran in (("plain", 4), ("steered", 6)):
        side = result[key]
        side["commit_step"] = [-1] * 3 + list(range(ran)) + [12] * (12 - ran)
        final = [token if step < 12 else 0 for token, step in zip(side["history"][-1], side["commit_step"], strict=True)]
        side["history"] = [[t if c < s else 0 for t, c in zip(final, side["commit_step"], strict=True)] for s in range(13)]
        side["confidence"] = [0.0] * 3 + [0.5] * ran + [0.0] * (12 - ran)
        side["activation"] = [[2.0 if c < s else 0.0 for c in side["commit_step"]] for s in range(ran)]
    file.write_text(json.dumps(result))
    return parsed(report(folder))


def test_what_comes_after_the_end_is_not_shown(stopped):
    section = stopped.one("section", identity="generation")
    assert "<pad>" not in "".join(p.text for p in section.one("div", "finals").all("p", "window"))
    order = rows_of(section.one("table", "striped"))[1:]
    assert [row[0] for row in order] == [str(p) for p in range(3, 9)]
    assert [row[2] for row in order] == ["0", "1", "2", "3", "–", "–"] and [row[5] for row in order] == [str(s) for s in range(6)]
    assert [row[3] for row in order] == ["0.50"] * 4 + ["–"] * 2 and all(row[1] == "–" for row in order[4:])
    assert "0.00" not in [cell for row in order for cell in row]


def test_curves_and_scrubber_end_with_the_steps_that_ran(stopped):
    section = stopped.one("section", identity="generation")
    shown = {f.one("figcaption").one("strong").text: f for f in section.all("figure")}
    latent = rows_of(shown["The latent over steps"])[1:]
    assert [row[0] for row in latent] == [str(s) for s in range(6)]
    # the mean is over what stands there: nothing before the first token, then 2.0 at each
    assert [row[1] for row in latent] == ["–", *["2.00"] * 3, "–", "–"] and [row[2] for row in latent] == ["–", *["2.00"] * 5]
    assert [row[0] for row in rows_of(shown["Size of the edit"])[1:]] == [str(s) for s in range(6)]
    (line,) = shown["Size of the edit"].all("polyline")
    assert len({point.split(",")[0] for point in line.attributes["points"].split()}) == 6
    island = json.loads(stopped.one("script", identity="generation-0").text)
    assert (island["ran"], island["steps"]) == (6, 12)


def test_sets_and_generations_have_an_order_of_their_own(make_run):
    folder = make_run(latents=1, windows=1, layers=(2, 4))
    file = folder / "results" / "fidelity-pocket-dlm-2.json"
    result = json.loads(file.read_text())
    result["sets"] = dict(sorted(result["sets"].items(), reverse=True)) | {"odd": {}}
    file.write_text(json.dumps(result))
    other = json.loads((folder / "results" / "generation.json").read_text()) | {"dictionary": "pocket-dlm/resid_post@2_k32"}
    (folder / "results" / "z.json").write_text(json.dumps(other))
    run = read_run(folder)
    assert list(run.dictionaries[0].sets) == ["all", "masked", "visible", "odd"]
    assert [g["dictionary"] for g in run.generations] == ["pocket-dlm/resid_post@2_k32", "pocket-dlm/resid_post@4_k32"]


def test_results_of_other_kinds_and_versions_are_named(make_run):
    folder = make_run(latents=1, windows=1, layers=(2,))
    (folder / "results" / "x.json").write_text('{"kind": "transfer", "version": 1}')
    (folder / "results" / "y.json").write_text('{"kind": "fidelity", "version": 7}')
    said = parsed(report(folder)).one("section", identity="summary").text
    assert "x.json: this report does not show results of kind 'transfer'" in said and "y.json: written as version 7" in said


def test_numbers_that_are_not_there_are_dashes(make_run):
    folder = make_run(latents=1, windows=1, layers=(2,))
    file = folder / "results" / "fidelity-pocket-dlm-2.json"
    result = json.loads(file.read_text())
    result["sets"]["all"] |= {"explained_variance": float("nan"), "intervals": {}, "l0": None, "filtered": {}}
    file.write_text(json.dumps(result))
    rows = rows_of(parsed(report(folder)).one("section", identity="summary").one("table"))
    assert rows[1][1:3] == ["–", "–"]


def test_a_resumed_curve_counts_its_last_line_and_a_torn_end_is_no_error(make_run):
    folder = make_run(latents=1, windows=1, steps=3)
    file = folder / "dictionaries/pocket-dlm/resid_post@2_k32/metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 2, "loss": 77.0}\n{"step": 4, "lo')
    curve = read_run(folder).dictionaries[0].curve
    assert [(e["step"], e["loss"] == 77.0) for e in curve] == [(1, False), (2, True), (3, False)]


def test_long_curves_are_thinned_and_keep_their_ends(make_run):
    folder = make_run(latents=1, windows=1, steps=200, layers=(2,))
    figure = next(iter(parsed(report(folder)).one("section", identity="training").all("figure")))
    rows = rows_of(figure.one("details"))
    assert len(rows) == 61 and rows[1][0] == "1" and rows[-1][0] == "200"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: None, "no run folder"),
        (lambda f: (f / "results").mkdir(parents=True), "holds no results"),
    ],
)
def test_folders_that_are_no_runs(tmp_path, damage, message):
    damage(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        report(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results/run.json", '{"kind": "run", ', "run.json is not readable JSON"),
        ("results/run.json", "[1, 2]", "run.json holds a list"),
        ("results/features-pocket-ar-2.json", '{"kind": "features", "dictionary": "a/b@1"}', "lacks records"),
        ("results/z.json", '{"kind": "features", "dictionary": "a/b@1", "records": [{"latent": 1, "windows": [{}]}]}', "lacks tokens"),
        ("results/z.json", '{"kind": "fidelity"}', 'names no "dictionary"'),
        ("dictionaries/pocket-ar/resid_post@2_k32/metrics.jsonl", 'x\n{"step": 1}\n', "line 1: not a JSON object"),
    ],
)
def test_damaged_files_are_named_and_an_old_report_is_kept(make_run, name, content, message):
    folder = make_run(latents=1, windows=1, layers=(2,))
    report(folder)
    before = (folder / "report.html").read_bytes()
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        report(folder)
    assert "\n" not in str(caught.value)
    assert (folder / "report.html").read_bytes() == before


def test_a_folder_that_cannot_be_written_to_is_said_and_left_clean(make_run):
    folder = make_run(latents=1, windows=1, layers=(2,))
    (folder / "report.html").mkdir()
    (folder / "report.html" / "in the way").touch()
    with pytest.raises(UserError, match="cannot be written"):
        report(folder)
    assert not list(folder.glob(".report-*"))


def test_the_same_run_gives_the_same_bytes(whole):
    before = whole[1].read_bytes()
    assert report(whole[0]).read_bytes() == before


def test_size_of_a_latent_is_bounded(make_run):
    folder = make_run(latents=6, windows=10, length=32, layers=(2,))
    sizes = [report(folder).stat().st_size]
    for file in (folder / "results").glob("features-*.json"):
        result = json.loads(file.read_text())
        file.write_text(json.dumps(result | {"records": result["records"][:2]}))
    sizes.append(report(folder).stat().st_size)
    assert 5_000 < (sizes[0] - sizes[1]) / (3 * 4) < 18_000  # bytes a latent; 300 of them stay near 5 MB


def test_records_as_the_analysis_writes_them_are_shown(make_run):
    from dlmscope_jax.analysis.records import FeatureRecord, Window, records_to_result

    window = Window("sampled", "a.document", 7, 0.25, (3, 11), (10, 11), (1, 0), (0.0, 2.5), 1, decile=4)
    record = FeatureRecord(
        "pocket-dlm", "resid_post@2", 99, "all", 1000, 0.125, 0.25, None, ({"low": 0.2, "high": 0.3, "rows": 1000, "density": 0.125},),
        6, 2.5, 1.5, (window,), {"top": [[11, 1.5]], "bottom": [[10, -1.5]]}, ((11, 4.25, 3),), ((5, 0.75),),
        {3: "<|mask|>", 10: " yes", 11: "no"}, "a description",
    )  # fmt: skip
    folder = make_run(latents=1, windows=1, layers=(2,))
    result = records_to_result([record], side="test", dead_share=0.5, selection="one", dictionary="pocket-dlm/resid_post@2_k32")
    (folder / "results" / "features-pocket-dlm-2.json").write_text(json.dumps(result))
    article = next(iter(parsed(report(folder)).all("article")))
    assert article.one("p", "description").text == "a description"
    lists = {n.one("h5").text: n.one("ol").text for n in article.one("div", "lenses").children}
    assert lists == {"Logit lens, raises": "no 1.50", "Logit lens, lowers": "·yes −1.50", "Fires on more than elsewhere, z": "no 4.2"}
    assert rows_of(article.one("div", "windows"))[1] == ["sampled", "a.document", "7", "0.25", "2.50", "▢·yesno"]
    assert rows_of(article.one("figure"))[1] == ["0.25", "12.5 %"]
    assert article.one("p", "said").text.endswith("5 (0.75)")


def test_every_control_of_the_analysis_has_a_name_and_a_mark():
    from dlmscope_jax.analysis.controls import CONDITIONS
    from dlmscope_jax.report import insertion

    assert set(CONDITIONS) - {"clean"} == set(insertion._CONDITIONS)


def test_names_of_dictionaries_give_their_place():
    assert Dictionary("a/resid_post@2_k32", "a", "resid_post@2", 32).label == "resid_post@2, k 32"
    assert Dictionary("a/resid_post@2", "a", "resid_post@2", None).label == "resid_post@2"

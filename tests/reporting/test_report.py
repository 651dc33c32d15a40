"""A report counts real tensors, names every site and its reason, and says the same in every form."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re

import pytest
import torch
from torch import Tensor, nn

import rpqfx
from rpqfx import Policy, Report, Rule
from rpqfx.errors import RPQError
from rpqfx.nn import RPQConv2d, RPQLinear, RPQWeight
from rpqfx.reporting.report import dense_bytes
from rpqfx.reporting.tables import size
from tests.models import CASES, GPT, MLP, SMALL, Case, quantized_weights


def real_bytes(model: nn.Module) -> int:
    """Of every distinct storage in a model."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr() if t.numel() else id(t): t.nbytes for t in tensors}.values())


def mixed() -> nn.Module:
    torch.manual_seed(0)
    rules = (Rule("blocks.0.fc1", skip="left dense <b>on purpose</b> & said so"), Rule("nobody", codebook_bits=2))
    policy = Policy(codebook_dim=4, codebook_bits=2, min_size=64, rules=rules, sharing="role")
    return rpqfx.rpqify(GPT(), policy)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_bytes_are_those_of_the_real_tensors(case: Case):
    model = case.model(torch.float32)
    small = rpqfx.rpqify(model, case.policy)
    made = rpqfx.report(small)
    assert made.before == real_bytes(model) == dense_bytes(model)
    assert made.after == real_bytes(small)
    assert made.codebooks + made.codes + made.other == made.after < made.before
    weights = {id(w): w for w in quantized_weights(small).values()}.values()
    assert made.codebooks == sum(w.codebooks.nbytes for w in weights)
    assert made.codes == sum(w.codes.nbytes for w in weights)
    dense = {id(p) for n, p in model.named_parameters() if n in case.rewritten}
    assert made.other == sum(p.nbytes for p in model.parameters() if id(p) not in dense) + sum(
        b.nbytes for b in model.buffers()
    )


@pytest.mark.parametrize("sharing", ["own", "layer", "shape", "role"])
def test_shared_codebooks_count_once(sharing: str):
    torch.manual_seed(0)
    policy = Policy(
        codebook_dim=4, codebook_bits=2, min_size=64, sharing=sharing, scale=True, signs=True, allow_growth=True
    )
    policy = dataclasses.replace(policy, column_scale=True)
    small = rpqfx.rpqify(GPT(depth=3), policy)
    made = rpqfx.report(small)
    assert made.after == real_bytes(small)
    shared = sum(record.shared for record in made.sites)
    assert sum(r.after for r in made.rewritten) == made.codebooks + made.codes
    assert (shared > 0) == (sharing in ("shape", "role"))
    apart = sum(w.codebooks.nbytes for w in {id(w): w for w in quantized_weights(small).values()}.values())
    assert made.codebooks + shared == apart + sum((r.spec.num_vectors + r.spec.dim) * 4 for r in made.rewritten)
    assert ("shared with earlier sites" in str(made)) == (shared > 0)


@pytest.mark.parametrize("sharing", ["own", "role"])
def test_bits_a_weight_are_those_of_the_stored_tensors(sharing: str):
    """Codes at their true width, floats as they would be stored, codebooks that are shared with the first site."""
    torch.manual_seed(0)
    policy = Policy(
        codebook_dim=4, codebook_bits=3, min_size=64, sharing=sharing, scale=True, signs=True, allow_growth=True
    )
    small = rpqfx.rpqify(GPT(depth=3), policy)
    held, seen = quantized_weights(small), set()
    with torch.no_grad():
        held["tok.weight"].scale.fill_(0.5)  # exact in two bytes
    made = rpqfx.report(small)
    for record in made.rewritten:
        weight, spec = held[record.name], record.spec
        uses = spec.num_vectors * spec.num_subvectors
        signs = 8 * spec.num_subvectors * -(-spec.num_vectors // 8)
        assert record.stored_code_bits == 8 * -(-uses * 3 // 8) + signs
        first = id(weight.codebooks) not in seen
        assert record.stored_codebook_bits == 32 * weight.codebooks.numel() * first
        assert record.stored_scale_bits == spec.num_vectors * (16 if record.name == "tok.weight" else 32)
        assert record.stored_bits == record.stored_code_bits + record.stored_codebook_bits + record.stored_scale_bits
        assert record.bits_per_weight == pytest.approx(record.stored_bits / (spec.num_vectors * spec.dim))
        seen.add(id(weight.codebooks))
    assert (len(seen) < len(made.rewritten)) == (sharing == "role")
    assert made.stored_bits == sum(record.stored_bits for record in made.rewritten)
    assert made.weights == sum(p.numel() for n, p in GPT(depth=3).named_parameters() if n in held)
    assert made.bits_per_weight == pytest.approx(made.stored_bits / made.weights)
    values = made.to_dict()
    assert (values["stored_bits"], values["bits_per_weight"]) == (made.stored_bits, made.bits_per_weight)
    assert values["sites"][0]["bits_per_weight"] == made.sites[0].bits_per_weight


def test_what_was_left_alone_has_no_bits_a_weight():
    made = rpqfx.report(mixed())
    assert {(site.stored_bits, site.bits_per_weight) for site in made.skipped} == {(0, 0.0)}


def test_every_floating_parameter_of_a_weight_counts_as_its_scales():
    small = mixed()
    before = rpqfx.report(small)
    small.tok.weight_rpq.register_parameter("more", nn.Parameter(torch.tensor([0.1, 0.2])))
    after = rpqfx.report(small)
    assert after.stored_bits - before.stored_bits == 64 == sum(site.stored_scale_bits for site in after.sites)
    assert after.codebooks - before.codebooks == 8 and after.other == before.other


@pytest.mark.parametrize("form", ["text", "markdown", "html"])
def test_each_form_shows_the_bits_a_weight_and_their_parts(form: str):
    layer = RPQLinear(64, 1000, codebook_dim=4, codebook_bits=6, scale=True, bias=False)
    with torch.no_grad():
        layer.weight_rpq.codebooks.copy_(layer.weight_rpq.codebooks.half())
        layer.weight_rpq.scale.fill_(0.1)
    layer.weight_rpq.codes = layer.weight_rpq.codes.flip(-1)  # not as they were drawn
    # 6 bits for 4 weights; 16 x 64 x 4 entries of 16 bits; 1000 scales of 32 bits
    wanted = "3.02 bits a weight as saved: codes 1.50, codebooks 1.02, scales 0.50"
    assert wanted in FORMS[form](rpqfx.report(nn.Sequential(layer)))
    plain = RPQLinear(64, 1000, codebook_dim=4, codebook_bits=6)
    drawn = FORMS[form](rpqfx.report(nn.Sequential(plain)))
    assert "2.05 bits a weight as saved: codes 0.00, codebooks 2.05; random codes of 1 site as a seed" in drawn
    plain.weight_rpq.codes = plain.weight_rpq.codes.flip(-1)
    bare = FORMS[form](rpqfx.report(nn.Sequential(plain)))
    assert "3.55 bits a weight as saved: codes 1.50, codebooks 2.05" in bare and ", scales" not in bare
    assert "as a seed" not in bare


def test_after_half_the_bytes_are_half():
    small = mixed()
    before = rpqfx.report(small)
    after = rpqfx.report(small.half())
    assert after.codebooks * 2 == before.codebooks and after.codes == before.codes
    assert after.other * 2 == before.other and after.after == real_bytes(small)


def test_every_site_is_there_with_its_spec_or_its_reason():
    made = rpqfx.report(mixed())
    records = {record.name: record for record in made.sites}
    assert set(records) == {n for n, p in GPT().named_parameters() if p.dim() > 1}
    assert {*made.rewritten, *made.skipped} == set(made.sites)
    for record in made.rewritten:
        assert record.spec is not None and record.reason is None and 0 < record.error < 1
    for record in made.skipped:
        assert record.spec is None and record.reason and record.before == record.after
    assert records["tok.weight"].names == ("tok.weight", "head.weight")
    assert (records["tok.weight"].kind, records["tok.weight"].module_type) == ("embedding", "Embedding")
    assert records["blocks.0.fc1.weight"].reason.startswith("left dense")
    assert made.notes == ("rule 'nobody' matches no site",)


def test_plans_are_shown_as_they_are_now_where_they_are_pinned():
    small = mixed()
    assert "plan" not in str(rpqfx.report(small))
    assert {record.plan for record in rpqfx.report(small).sites} == {"auto"}
    small.blocks[1].fc1.weight_rpq.plan = "lookup"
    small.tok.weight_rpq.plan = "dequantize"
    made = rpqfx.report(small)
    pinned = {record.name: record.plan for record in made.sites if record.plan != "auto"}
    assert pinned == {"blocks.1.fc1.weight": "lookup", "tok.weight": "dequantize"}
    for show in FORMS.values():
        lines = {name: line for line in re.split("\n|</tr>", show(made)) for name in pinned if name in line}
        assert all(f"plan {plan}" in lines[name] for name, plan in pinned.items())
        assert show(made).count("plan ") == 2
    assert made.to_dict()["sites"][0]["plan"] in ("auto", "dequantize")


FORMS = {"text": str, "markdown": Report.to_markdown, "html": Report.to_html}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_shows_every_site_number_and_reason(form: str):
    made = rpqfx.report(mixed())
    text = html.unescape(FORMS[form](made)) if form == "html" else FORMS[form](made)
    for record in made.sites:
        assert record.name in text and size(record.before) in text and size(record.after) in text
        if record.reason:
            assert f"left: {record.reason}" in text
        else:
            assert f"{record.spec.num_vectors} x {record.spec.dim}" in text
            assert f"fit error {record.error:.3f}" in text
    assert "tok.weight (= head.weight)" in text
    assert f"8 of 10 sites quantized; {size(made.before)} before, {size(made.after)} after" in text
    assert "rule 'nobody' matches no site" in text


def test_text_is_a_table_whose_columns_line_up():
    lines = str(rpqfx.report(mixed())).splitlines()
    at = lines[0].index("kind")
    assert lines[1] == "-" * max(len(line) for line in lines[:12])
    assert all(line[at - 1] == " " and line[at] != " " for line in lines[2:12])


def test_markdown_has_equally_many_cells_in_every_row():
    rows = [line for line in rpqfx.report(mixed()).to_markdown().splitlines() if line.startswith("|")]
    assert len(rows) == 12 and len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


class Page(html.parser.HTMLParser):
    """Checks nesting; keeps tags, texts and bars."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def page(text: str) -> Page:
    parsed = Page()
    parsed.feed(text)
    parsed.close()
    assert parsed.open == []
    return parsed


def test_html_is_well_formed_and_needs_nothing_else():
    text = rpqfx.report(mixed()).to_html()
    parsed = page(text)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script", "link", "img", "iframe"})
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert not any({"src", "href"} & set(attributes) for _, attributes in parsed.tags)


def test_html_has_a_bar_for_each_layer_before_and_after_on_one_scale():
    made = rpqfx.report(mixed())
    bars = [a for tag, a in page(made.to_html()).tags if tag == "div" and "bar" in str(a.get("class"))]
    widths = [float(re.search(r"width:([\d.]+)%", str(a["style"])).group(1)) for a in bars]
    most = max(max(r.before, r.after) for r in made.sites)
    wanted = [100 * n / most for r in made.sites for n in (r.before, r.after)]
    assert widths == pytest.approx(wanted, abs=1e-3)
    classes = [a["class"] for a in bars]
    assert classes[0::2] == ["bar dense"] * len(made.sites)
    assert classes[1::2] == ["bar held" if r.spec else "bar left" for r in made.sites]


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.add_module("<script>alert('x|y')</script>&", nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return next(self.children())(x)


def test_names_are_escaped():
    made = rpqfx.report(rpqfx.rpqify(Odd(), SMALL))
    parsed = page(made.to_html())
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert made.sites[0].name in parsed.cells
    rows = [line for line in made.to_markdown().splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_layers_built_by_hand_are_reported():
    model = nn.Sequential(
        RPQConv2d(8, 32, 3, codebook_dim=9, codebook_bits=4),
        nn.Flatten(),
        RPQLinear(32, 64, codebook_bits=4, split="column"),
    )
    made = rpqfx.report(model)
    assert [record.name for record in made.sites] == ["0.weight", "2.weight"]
    assert made.after == real_bytes(model) and made.sites[1].split == "column"
    assert made.sites[0].before == 4 * 32 * 8 * 9 and made.before > made.after
    assert "RPQConv2d" in {record.module_type for record in made.sites} and "0.weight" in str(made)
    model[2].weight_rpq = model[2].weight_rpq  # still one
    assert len(rpqfx.report(model).sites) == 2


def test_layers_built_by_hand_that_share_codebooks_count_them_once():
    first, second = (RPQLinear(16, 64, codebook_bits=4, codebook_dim=4) for _ in range(2))
    second.weight_rpq = first.weight_rpq
    made = rpqfx.report(nn.Sequential(first, second))
    assert [record.names for record in made.sites] == [("0.weight", "1.weight")]
    assert made.after == real_bytes(nn.Sequential(first, second))


def test_a_lone_weight_in_a_model_is_no_layer():
    with pytest.raises(RPQError, match="no weight of this model is quantized"):
        rpqfx.report(nn.Sequential(RPQWeight(rpqfx.CodebookSpec(64, 16, 4, 16))))


def test_a_dense_model_has_no_report():
    with pytest.raises(RPQError, match="no weight of this model is quantized; pass the model that rpqify returned"):
        rpqfx.report(MLP())


def test_a_report_is_plain_data():
    made = rpqfx.report(mixed())
    values = json.loads(json.dumps(made.to_dict()))
    assert values["after"] == made.after and len(values["sites"]) == len(made.sites)
    assert values["sites"][1]["spec"]["codebook_dim"] == 4


def test_a_model_on_the_meta_device_is_reported_by_what_it_will_take():
    with torch.device("meta"):
        model = GPT()
    made = rpqfx.report(rpqfx.rpqify(model, SMALL))
    torch.manual_seed(0)
    assert made.after == rpqfx.report(rpqfx.rpqify(GPT(), SMALL)).after
    assert all(record.error is None for record in made.sites)


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2_345_678, "2.35 MB"), (5 * 10**9, "5.00 GB")]
)
def test_sizes_are_decimal(count: int, shown: str):
    assert size(count) == shown

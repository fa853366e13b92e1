"""The pages are true: their Python runs, their links lead somewhere, the names they name exist.

Blocks of Python run page by page, one after the other in one namespace, on the ranks that there
are. GIVEN is what a page takes for granted. A block that cannot run here has, on the line before
it, a comment with the reason:

    <!-- not run: needs a GPU -->
"""

import os
import re
import runpy
import sys
from functools import partial

import exchange_laws
import numpy as np
import pytest
import torch
from test_architecture import ROOT, fresh

import mpicomp
from mpicomp import checkpoint
from mpicomp.compressors import registry
from mpicomp.exchange import registry as exchange_registry

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^>]+) -->\n)?"
                   r"```(?P<kind>python|diff)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(path):
    """[(line number, code, why it is not run or None)]; of a diff, what it leads to."""
    text = path.read_text()
    found = []
    for match in BLOCK.finditer(text):
        code = match["code"]
        if match["kind"] == "diff":
            code = "".join(line[1:] for line in code.splitlines(True) if line[0] != "-")
        found.append((text[:match.start("code")].count("\n") + 1, code, match["why"]))
    return found


# ---- what pages take for granted ---------------------------------------------------------------


class Net(torch.nn.Module):
    """A small model with what pages speak of: layers, an activation, an embedding of no use."""

    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(5, 4, sparse=True) if sparse else None
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(),
                                          torch.nn.Linear(8, 8), torch.nn.ReLU(),
                                          torch.nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x + self.table.weight[0] if self.table else x)


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)


def given(page, comm, **model):
    """The names that a block of this page may use without having made them."""
    net = Net(**model)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    x, y = batch(comm.rank, 0)
    names = {
        "torch": torch, "np": np, "mpicomp": mpicomp, "sys": sys, "checkpoint": checkpoint,
        "Net": Net,
        "net": net, "model": net, "optimizer": optimizer, "x": x, "y": y, "seed": 0, "step": 0,
        "rank": comm.rank, "steps": 2, "clip_grad_norm_": torch.nn.utils.clip_grad_norm_,
        "loss_fn": torch.nn.functional.cross_entropy, "loss": torch.nn.functional.cross_entropy,
        "examples": lambda step, rank, size: batch(rank, step),
        "my_share_of_the_batches": [batch(comm.rank, step) for step in range(2)]}
    if page == "checkpoints":
        names |= {"reducer": mpicomp.Reducer(net.named_parameters(), "onebit", comm
                                             ).attach(optimizer), "steps": 200}
    if page in ("step", "planning"):
        names["loss"] = names["loss_fn"](net(x), y)
    return names


# ---- the blocks --------------------------------------------------------------------------------


@pytest.fixture
def page(comm, tmp_path, monkeypatch):
    """Runs the blocks of a page in a folder that all ranks share; what they registered is gone."""
    monkeypatch.chdir(comm.bcast(str(tmp_path)))
    monkeypatch.setattr(registry, "_REGISTRY", registry.registry())
    monkeypatch.setattr(exchange_registry, "_REGISTRY", exchange_registry.exchanges())
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, "cpu"))
    monkeypatch.setattr(torch.amp.GradScaler.func, "__init__", _on_the_cpu)

    def run(path, names, numbers=None):
        for number, (line, code, why) in enumerate(blocks(path)):
            if why is None and (numbers is None or number in numbers):
                exec(compile("\n" * line + code, str(path), "exec"), names)
        return names

    yield run
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


_initialise = torch.amp.GradScaler.__init__


def _on_the_cpu(self, device, *others, **keywords):
    """Pages say "cuda", which is where loss scaling is used."""
    _initialise(self, "cpu", **keywords)


SPECIAL = {"step", "checkpoints", "adding-a-compressor", "adding-an-exchange"}


@pytest.mark.mpi
@pytest.mark.parametrize("path", [path for path in PAGES if path.stem not in SPECIAL
                                  and any(why is None for *_, why in blocks(path))],
                         ids=lambda path: path.stem)
def test_the_python_of_a_page_runs(path, page, comm):
    page(path, given(path.stem, comm) | {"__name__": "page"})


@pytest.mark.mpi
def test_the_python_of_step(page, comm):
    path = ROOT / "docs" / "step.md"
    last = len(blocks(path)) - 1
    names = page(path, given("step", comm), range(last))
    assert names["reducer"].step == 1
    names = page(path, given("step", comm, sparse=True), [last])
    names["model"](names["x"] * 0).sum().backward()
    names["reducer"].finish()
    assert names["reducer"].step == 1


@pytest.mark.mpi
def test_the_python_of_checkpoints(page, comm):
    """Twice: the second run goes on from what the first one has left."""
    path = ROOT / "docs" / "checkpoints.md"
    names = page(path, given("checkpoints", comm), [0])
    assert names["found"] is None and checkpoint.folders("run")
    names = page(path, given("checkpoints", comm), [0])
    assert names["start"] == 200
    names["manifest"]["ranks"] = -1  # of another number of ranks
    page(path, names, range(1, len(blocks(path))))


@pytest.mark.mpi
def test_the_python_of_adding_a_compressor(page, comm):
    page(ROOT / "docs" / "adding-a-compressor.md", given("", comm) | {"__name__": "page"})
    names = given("", comm)
    mpicomp.DistributedOptimizer(names["optimizer"], names["net"].named_parameters(),
                                 "scaledsign:exchange=allgather,feedback=no", comm)
    names["loss_fn"](names["net"](names["x"]), names["y"]).backward()
    names["optimizer"].step()


@pytest.mark.mpi
def test_the_python_of_adding_an_exchange(page, comm):
    """Its exchange obeys the laws, with the last rank as the hub, and knows how many there are."""
    page(ROOT / "docs" / "adding-an-exchange.md", given("", comm) | {"__name__": "page"})
    exchange_laws.check(f"star,hub={comm.size - 1}", comm)
    named = given("", comm)["net"].named_parameters()
    with pytest.raises(mpicomp.SpecError, match=f"hub=9 found, this job has {comm.size} ranks"):
        mpicomp.Reducer(named, "onebit:exchange=star,hub=9", comm)


def test_blocks_that_are_not_run_say_why():
    every = {path.stem: blocks(path) for path in PAGES}
    assert all(len(why.split()) > 1 for page in every.values() for *_, why in page if why)
    assert sum(why is None for page in every.values() for *_, why in page) >= 9
    fences = sum(len(re.findall(r"^```(?:python|diff)$", path.read_text(), re.M)) for path in PAGES)
    assert fences == sum(map(len, every.values()))


# ---- names and links ---------------------------------------------------------------------------

NO_ATTRIBUTES = {
    "mpicomp.compressors": "a group of entry points",
    "mpicomp.exchanges": "a group of entry points",
    "mpicomp.transport.calls.Calls": "the class of an exchange's wire",
    "mpicomp.transport.meter.Meter": "the class of stats",
    "mpicomp.transport.probe": "python -m mpicomp.transport.probe",
    "mpicomp.kernels.gpu": "what kernels.of gives for an array on a device"}


def test_names_that_pages_name_are_there_after_import_mpicomp():
    named = {name for path in PAGES
             for name in re.findall(r"\bmpicomp(?:\.[A-Za-z_]\w*)+", path.read_text())}
    assert {"mpicomp.nn.convert", "mpicomp.ddp.comm_hook", "mpicomp.checkpoint"} <= named
    # each as the first thing that is used: what was imported for one may be there for another
    code = ("import sys, mpicomp\n"
            f"for name in {sorted(named - set(NO_ATTRIBUTES))}:\n"
            "    eval(name)\n"
            "    for module in [m for m in sys.modules if m.startswith('mpicomp.')]:\n"
            "        vars(mpicomp).pop(module.split('.')[1], None)\n")
    assert fresh(code) == ("", "")


def anchors(path):
    """What a link may lead to in a page: its headings, as GitHub and Sphinx name them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
            for heading in re.findall(r"^#{1,3} (.*)$", text, re.M)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text().replace("\n", " ")):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert os.path.exists(there), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{path.name}: {target}"


def test_sphinx_knows_the_same_anchors():
    """It makes none by itself: four links were dead."""
    assert runpy.run_path(str(ROOT / "docs" / "conf.py"))["myst_heading_anchors"] == 3


def test_every_page_is_in_the_table_of_contents():
    toc = re.search(r"```\{toctree\}(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.S)[1]
    assert {path.stem for path in PAGES} - {"README", "index"} <= set(toc.split())

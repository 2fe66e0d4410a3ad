"""Several supernets: what each of them is, what a child takes over, which serves an architecture, how one is chosen."""
from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from split_runs import EDGES, EPOCH_STEPS, SEED, built, gm, go, split_only, tree
from torch import Tensor

import nas.evaluate as evaluating
from nas import checkpoint
from nas.bilevel import Alphas, Weights
from nas.budget import Budget
from nas.build import rebuild
from nas.bundle import load_bundle
from nas.data import Data
from nas.limits import Select
from nas.ranks import Ranks
from nas.search import Found
from nas.searchers.random import Random
from nas.splits.grow import Leaf, choose, derived, leaves, rehearse
from nas.splits.split import Split
from nas.splits.tree import Tree, before, read_split
from nas.strategies.darts import DARTS
from nas.strategies.fairnas import FairNAS
from nas.strategies.spos import SPOS
from search_spaces import nats

NESTED = gm([1, 2], ["all", "weights"], groups=[2, 2])
X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Found, list[str]]]:
    """A run of two levels, four leaves, and the splits of the data that were read in batches meanwhile."""
    batches, read = Data.batches, list[str]()

    def watched(self: Data, split: str, *given: Any, **named: Any) -> Any:
        read.append(self.reads(split))
        return batches(self, split, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Data, "batches", watched)
        yield go(tmp_path_factory.mktemp("nested") / "run", NESTED), read


def grown(nested: tuple[Found, list[str]]) -> Tree:
    return tree(nested[0].folder, NESTED)


def stored(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.pt", weights_only=True)


def logits(built: Any, arch: Mapping[str, Any], training: bool) -> Tensor:
    net = built.strategy.network(arch).train(training)
    with torch.no_grad():
        return net(X, arch)


# -- structure ----------------------------------------------------------------------------------------------------------


def test_the_leaves_partition_the_space(nested: tuple[Found, list[str]]) -> None:
    found = grown(nested)
    every = found.level(2)
    assert [node.name for node in found.nodes()] == ["", "0", "0.0", "0.1", "1", "1.0", "1.1"]
    assert [node.name for node in every] == ["0.0", "0.1", "1.0", "1.1"]
    assert sum(node.space.size for node in every) == 5**6
    assert [sum(child.space.size for child in found.children(node)) for node in found.level(1)] == [
        node.space.size for node in found.level(1)]  # fmt: skip
    space, rng = nats.Topology(2, 1), random.Random(2)
    for _ in range(300):
        arch = {choice.name: rng.choice(choice.options) for choice in space.choices}
        holds = [node.name for node in every
                 if all(arch[choice.name] in choice.options for choice in node.space.choices)]  # fmt: skip
        assert holds == [found.leaf(arch).name]


def test_an_architecture_is_served_by_its_leaf(nested: tuple[Found, list[str]]) -> None:
    found, rng = grown(nested), random.Random(4)
    met = set()
    for _ in range(40):
        arch = found.built.space.sample(rng)
        node, net = found.leaf(arch), found.network(arch)
        met.add(node.name)
        weights = stored(node.folder)["strategy"]["setup"]["net"]
        assert all(torch.equal(p, weights[name]) for name, p in net.named_parameters())
        assert net is found.network(arch) and net is found.serving(arch).net and found.fits(arch)
    assert met == {"0.0", "0.1", "1.0", "1.1"}
    assert found.trained().finished and not found.probabilities()


def test_every_node_says_what_it_is(nested: tuple[Found, list[str]]) -> None:
    """Its config: a search of its own, from the epoch on at which its schedules began; its seed; how far it went."""
    found = grown(nested)
    seeds = set()
    for node in found.nodes():
        payload = stored(node.folder)
        config = payload["config"]
        assert payload["step"] == found.steps(node) == found.done(node)
        if node.path:
            free = {name: tuple(options) for name, options in config["part"].items()}
            assert free == {c.name: c.options for c in node.space.choices if len(c.options) < 5} and free
            assert config["epochs"] == node.level % 2 + 1 and config["seed"] == payload["seed"] != SEED
        seeds.add(payload["seed"])
    assert len(seeds) == 7 and found.root.began == 0
    assert [(n.began, n.ends, n.last) for n in found.level(2)] == [(2, 3, True)] * 4
    assert [(n.began, n.ends, n.last) for n in found.level(1)] == [(0, 2, False)] * 2
    assert [found.done(node) for node in (found.root, *found.level(1), *found.level(2))] == [2, 4, 4, 2, 2, 2, 2]


def test_a_part_that_is_searched_stays_one_in_the_children() -> None:
    """``part`` of the recipe and what a split leaves, both of the net's space."""
    whole = built(gm([1]), part={"node3.from0": ["none", "skip_connect"]})
    found = Tree(whole, gm([1]), Path("nowhere"), 3, SEED)
    said = {"choice": EDGES[0], "groups": [list(nats.OPS[:2]), list(nats.OPS[2:])]}
    config = found.config(found.born(found.root, said)[1], {"part": {"node3.from0": ["none", "skip_connect"]}, "split": {}})
    assert config["part"] == {"node1.from0": list(nats.OPS[2:]), "node3.from0": ["none", "skip_connect"]}
    assert "split" not in config


def test_an_exhaustive_split_has_a_child_for_each_option(tmp_path: Path) -> None:
    split = Split(by="exhaustive", at=[0], choices=["node2.from0"], inherit="weights")
    found = split_only(tmp_path / "run", split)
    children = found.children(found.root)
    assert [child.space["node2.from0"].options for child in children] == [(op,) for op in nats.OPS]
    said = read_split(tmp_path / "run" / "split.json")
    assert said["measured"] == {} and said["images"] == 0 and found.done(found.root) == 0
    assert not (tmp_path / "run" / "checkpoints" / "split.pt").exists()


# -- what a child takes over --------------------------------------------------------------------------------------------


def test_a_child_that_inherits_all_is_its_parent(tmp_path: Path) -> None:
    """At the moment of the split: what it computes, believes and remembers, and where its schedules stand."""
    found = split_only(tmp_path / "run", gm([1]), every=1)
    parent = found.open(found.root)
    for child in found.children(found.root):
        heir, rng = found.open(child), random.Random(1)
        assert heir.step == parent.step == EPOCH_STEPS and heir.space.size == child.space.size < 5**6
        for arch in (heir.space.largest(), heir.space.smallest(), heir.space.sample(rng), heir.space.sample(rng)):
            for training in (True, False):
                assert torch.equal(logits(parent, arch, training), logits(heir, arch, training))
        mine, theirs = checkpoint.state_of(heir.strategy), checkpoint.state_of(parent.strategy)
        assert all(torch.equal(mine["alpha"][key], theirs["alpha"][key]) for key in theirs["alpha"])
        for name in ("w", "a"):
            a, b = getattr(heir.strategy, name), getattr(parent.strategy, name)
            assert a.count == b.count == EPOCH_STEPS and a.rate == b.rate
            states = [(a.optimizer.state[p], b.optimizer.state[q]) for p, q in zip(a.params, b.params)]
            assert states and all(torch.equal(s[key], t[key]) for s, t in states for key in t if isinstance(t[key], Tensor))
        assert heir.setup.steps == parent.setup.steps == 6
        fresh = stored(child.folder)
        assert fresh["keep"]["picks"]["history"] == [] and stored(tmp_path / "run")["keep"]["picks"]["history"]


@pytest.mark.parametrize("inherit", ["weights", "nothing"])
def test_a_child_that_begins_anew(inherit: str, tmp_path: Path) -> None:
    """Fresh alphas, optimizers, schedules; and weights, where it inherits nothing: those of no other."""
    begun, update = list[tuple[int, int, dict[str, Tensor], dict[str, Tensor], float]](), DARTS.update

    def watched(self: DARTS, draw: Any, now: Any) -> Any:
        if now.step == 0:
            begun.append((now.steps, self.w.count, {k: v.clone() for k, v in self.net.state_dict().items()},
                          {k: v.clone() for k, v in self.alpha.state_dict().items()}, self.w.rate))  # fmt: skip
        return update(self, draw, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DARTS, "update", watched)
        go(tmp_path / "run", gm([1], inherit))
    assert [(steps, count) for steps, count, *_ in begun] == [(2 if inherit == "weights" else 6, 0), (4, 0), (4, 0)]
    assert len({rate for *_, rate in begun}) == 1
    parent = stored(tmp_path / "run")["strategy"]
    old = parent["setup"]["net"]
    (one, a), (two, b) = [(net, alpha) for _, _, net, alpha, _ in begun[1:]]
    if inherit == "weights":
        assert all(torch.equal(t, old[name]) and torch.equal(t, two[name]) for name, t in one.items())
    else:
        drawn = [name for name, t in old.items() if t.ndim > 1 and t.is_floating_point()]
        assert len(drawn) > 20 and not any(torch.equal(one[name], other[name]) for name in drawn for other in (old, two))
    assert not any(torch.equal(x, y) for key in a for x, y in ((a[key], b[key]), (a[key], parent["alpha"][key])))


def test_arguments_before_the_last_split(tmp_path: Path) -> None:
    """Merged into those of the strategy, of the alphas too; the leaves have the strategy's own."""
    split = gm([1], before={"alphas": {"lr": 0.0, "weight_decay": 0.0}, "weights": {"lr": 0.05}})
    found = split_only(tmp_path / "run", split, DARTS(order=1, weights=Weights(momentum=0.5)))
    root, child = found.build(found.root).strategy, found.build(found.children(found.root)[0]).strategy
    assert root == DARTS(order=1, weights=Weights(lr=0.05, momentum=0.5), alphas=Alphas(lr=0.0, weight_decay=0.0))
    assert child == DARTS(order=1, weights=Weights(momentum=0.5))
    trained: Any = found.open(found.root).strategy
    assert trained.a.bases == [0.0] and trained.w.bases == [0.05]
    config = {"strategy": {"class_path": "DARTS", "init_args": {"order": 1, "alphas": {"lr": 0.3, "std": 0.1}}}}
    node = found.root._replace(path=(0,), last=False)
    assert found.config(node, config)["strategy"]["init_args"] == {
        "order": 1, "alphas": {"lr": 0.0, "std": 0.1, "weight_decay": 0.0}, "weights": {"lr": 0.05}}  # fmt: skip
    assert found.config(node._replace(last=True), config)["strategy"] == config["strategy"]


def test_nodes_share_no_part_of_the_strategy_that_starts() -> None:
    """A budget has state of its own once it has started: the space of one node must not become another's."""
    budget = Budget("60%")
    budget.start(built(gm([1])).costs, nats.Topology(2, 1))
    strategy = DARTS(order=1, budget=budget)
    found = Tree(built(gm([1]), strategy), gm([1]), Path("nowhere"), 3, SEED)
    one: Any = found.build(found.root).strategy
    two: Any = found.parts(1)[0]
    assert one.budget == two.budget == strategy.budget and len({id(s.budget) for s in (one, two, strategy)}) == 3
    assert "table" not in vars(one.budget) and "net" not in vars(one)


@pytest.mark.parametrize("changes, words", [
    ({"alpha": {}}, r"split.before.alpha is not an argument of DARTS. Allowed: order, xi, weights, alphas, budget"),
    ({"alphas": {"rate": 1}}, r"split.before.alphas.rate is not an argument of Alphas. Allowed: lr, "),
    ({"order": 3}, r"order = 3 is not known"),
    ({"weights": {"lr": "high"}}, r"split.before = .*'high'.* does not fit DARTS: "),
    ({"budget": {"aim": 1}}, r"split.before = .*'aim'.* does not fit DARTS: "),
])  # fmt: skip
def test_arguments_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        before(DARTS(order=1), changes)
    assert "\n" not in str(error.value)


def test_a_section_that_was_empty_can_be_filled() -> None:
    assert before(DARTS(order=1), {"budget": {"target": "60%"}}) == DARTS(order=1, budget=Budget("60%"))
    assert before(DARTS(budget=Budget("50%")), {"budget": None}) == DARTS()
    assert before(SPOS(), {}) == SPOS() and before(SPOS(), {}) is not SPOS()


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, words", [
    ({"at": [2, 1]}, r"split.at = \[2, 1\]: epochs \[2, 1\] of 3. Allowed: ascending, from 0, below 3"),
    ({"at": [1, 1]}, "ascending"), ({"at": [3]}, "below 3"), ({"at": [-1]}, "from 0"), ({"at": ["inf%"]}, "'inf%' is no epoch"),
    ({"at": ["soon"]}, "'soon' is no epoch. Allowed: whole numbers, or shares such as 25%"),
    ({"at": [1], "groups": [2, 2]}, r"split.groups = \[2, 2\] for 1 levels"),
    ({"at": [1, 2], "inherit": ["all"]}, r"split.inherit = \['all'\] for 2 levels"),
    ({"at": [1], "inherit": "some"}, "split.inherit = 'some' is not known"), ({"by": "hand"}, "split.by = 'hand' is not known"),
    ({"at": [1], "groups": 1}, "split.groups = 1"), ({"repeats": 0}, "split.repeats = 0"),
    ({"at": [1, 2], "by": "exhaustive"}, "An exhaustive split names the choice of each level"),
    ({"at": [1, 2], "by": "exhaustive", "choices": ["node1.from0"] * 2}, "Allowed: each once"),
    ({"at": [1], "by": "exhaustive", "choices": ["node9"]}, "node9"),
    ({"at": [1], "by": "exhaustive", "choices": ["node1.from0"]}, "The group none of node1.from0 would hold no architecture"),
    ({"at": [1], "choices": ["edge*"]}, "'edge\\*' matches no choice"),
    ({"at": [1], "groups": 3, "least": 2}, "none has options left for 3 groups of 2 or more"),
    ({"at": [1], "leave_out": ["stems.*"]}, "split.leave_out: 'stems.\\*' matches no parameter"),
    ({"at": [1], "before": {"lr": 1}}, "split.before.lr is not an argument of DARTS"),
    ({"at": [1], "before": {"weights": {"accumulate": 2}}}, "accumulate = 2"),
])  # fmt: skip
def test_a_split_that_does_not_fit_is_refused_before_a_folder_is_made(
    given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        go(tmp_path / "run", Split(**given))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_schedules_that_are_too_short_for_the_leaves_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="warmup_epochs = 2 are the whole run"):
        go(tmp_path / "run", gm([1], "nothing"), DARTS(order=1, alphas=Alphas(warmup_epochs=2)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split, world, fits", [
    (gm([1]), 8, True), (gm([1], groups=3), 8, False), (gm([1], groups=3), 4, True), (gm([1, 2]), 8, True),
    (Split(by="exhaustive", at=[1], choices=["node2.from0"]), 8, True),  # 1, 2, 1, 2 and 2 ranks
    (Split(by="exhaustive", at=[1], choices=["node2.from0"]), 16, False),  # three or four
])  # fmt: skip
def test_a_batch_divides_by_the_ranks_of_every_supernet(split: Split, world: int, fits: bool) -> None:
    whole = built(split)
    whole.ranks = Ranks(0, world, 0, True)
    if fits:
        rehearse(Tree(whole, split, Path("nowhere"), 3, SEED))
        return
    with pytest.raises(ValueError, match="batch_size = 16 does not divide by 3 ranks"):
        rehearse(Tree(whole, split, Path("nowhere"), 3, SEED))


def test_an_epoch_is_equally_long_for_all(tmp_path: Path) -> None:
    split = gm([1], before={"weights": {"accumulate": 2}})
    with pytest.raises(ValueError, match=r"split.before.weights.accumulate = 2, and 1 for the leaves"):
        go(tmp_path / "run", split, SPOS(), searcher=Random(trials=2))
    go(tmp_path / "run", gm([1]), SPOS(Weights(accumulate=2)), searcher=Random(trials=2), limits=Select(bn_images=16))
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Image-passes: training 160, splitting 320 (200.0% more)." in report  # 5 epochs of 32 images


def test_shares_of_the_run() -> None:
    assert Split(at=["25%", "50%", 3]).epochs(4) == [1, 2, 3] and Split().epochs(4) == []
    assert Split(groups=[2, 3]).levels == 0


@pytest.mark.parametrize("text, words", [
    ("{", "cannot be read"), ("[]", "is not a nas-split of version 1"),
    (json.dumps({"format": "nas-split", "version": 2}), "is not a nas-split of version 1"),
    (json.dumps({"format": "nas-split", "version": 1, "choice": "node1.from0", "groups": [[]]}), "measured, .* is missing"),
    ("groups", "groups is missing or damaged"), ("choice", "is not a split of this run: .*node7"),
])  # fmt: skip
def test_a_damaged_split_is_one_line(text: str, words: str, nested: tuple[Found, list[str]], tmp_path: Path) -> None:
    said = json.loads((nested[0].folder / "split.json").read_text())
    changed = {"groups": {**said, "groups": [1, 2]}, "choice": {**said, "choice": "node7.from0"}}.get(text)
    (tmp_path / "split.json").write_text(text if changed is None else json.dumps(changed))
    found = tree(tmp_path, NESTED)
    with pytest.raises(ValueError, match=words) as error:
        found.children(found.root)
    line = str(error.value)
    assert "\n" not in line and str(tmp_path / "split.json") in line and line.endswith("Delete it, and resume the run.")
    assert line.count("Delete it") == 1


# -- the pick -----------------------------------------------------------------------------------------------------------


def test_the_best_leaf_is_picked_and_test_is_never_read(nested: tuple[Found, list[str]]) -> None:
    found, read = nested
    every = leaves(grown(nested))
    assert set(read) == {"train", "valid"}  # no select split: valid stands for it
    best = max(leaf.row["metric"]["value"] for leaf in every)
    first = next(leaf for leaf in every if leaf.row["metric"]["value"] == best)
    assert choose(every) == first and found.arch.arch == first.row["arch"]
    assert found.arch.metrics["top1"] == first.row["metric"] and found.arch.metrics["top1"]["split"] == "valid"
    report = (found.folder / "report.md").read_text()
    assert f"**{first.node.name}**" in report and "**picked**" in report and report.count("top-1 0.") >= 4
    for leaf in every:
        first.node.space.check(first.row["arch"])
        said = json.loads((leaf.node.folder / "arch.json").read_text())
        assert said["arch"] == leaf.row["arch"] and said["metrics"]["top1"] == leaf.row["metric"]
        assert leaf.row["step"] == 1 and leaf.picks["history"][-1]["step"] == 1


def leaf_of(name: str, **row: Any) -> Leaf:
    node = tree(Path("nowhere"), gm([1])).root._replace(path=(int(name),))
    row = {"arch": {}, "step": 3, "fits": row["fits"], "metric": {"value": row["value"]}} if row else {}
    return Leaf(node, row, {})


def test_what_fits_the_budget_comes_first_then_accuracy_then_order() -> None:
    a, b, c = leaf_of("0", fits=False, value=0.9), leaf_of("1", fits=True, value=0.5), leaf_of("2", fits=True, value=0.6)
    assert choose([a, b, c]) is c and choose([a, b]) is b and choose([a, leaf_of("3")]) is a
    assert choose([c, c._replace(picks={"other": 1})]) is c
    assert choose([leaf_of("3"), leaf_of("4")]).node.path == (3,)
    last, best = {"fits": False, "step": 9}, {"fits": True, "step": 3}
    assert derived({"last": last, "best": best}) is best and derived({"last": best, "best": last}) is best
    assert derived({"last": last, "best": None}) is last and derived({"last": None, "best": None}) == {}


def test_a_searcher_picks_from_the_whole_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every subnet is scored in the weights of the leaf that holds it."""
    read, score = list[tuple[dict[str, Tensor], list[Any]]](), evaluating.score_archs

    def watched(net: Any, archs: Any, *given: Any, **named: Any) -> Any:
        read.append(({name: p.detach().clone() for name, p in net.named_parameters()}, list(archs)))
        return score(net, archs, *given, **named)

    monkeypatch.setattr(evaluating, "score_archs", watched)
    found = go(tmp_path / "run", gm([1]), SPOS(), searcher=Random(trials=12), limits=Select(bn_images=32), every=3)
    made = tree(tmp_path / "run", gm([1]), SPOS())
    served, of = set(), {leaf.name: stored(leaf.folder)["strategy"]["setup"]["net"] for leaf in made.level(1)}
    for weights, archs in read:
        for arch in archs:
            name = made.leaf(arch).name
            served.add(name)
            assert all(torch.equal(p, of[name][key]) for key, p in weights.items())
    assert served == {"0", "1"} and sum(len(archs) for _, archs in read) == 12
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"**{made.leaf(found.arch.arch).name}**" in report and "Picked by Random(trials=12)" in report
    assert found.arch.provenance["scored"] == 12 and not (tmp_path / "run" / "nodes" / "0" / "arch.json").exists()


def test_a_strategy_that_plans_its_run_counts_its_passes_in_the_report(tmp_path: Path) -> None:
    """Also where it knows them only once it has started."""
    split = Split(by="exhaustive", at=[1], choices=["node2.from0"])
    with pytest.raises(ValueError, match="FairNAS needs as many options in every open choice"):
        go(tmp_path / "odd", Split(at=[1], choices=["node2.from0"], repeats=1), FairNAS(), searcher=Random(trials=2))
    go(tmp_path / "run", split, FairNAS(), searcher=Random(trials=2), limits=Select(bn_images=16), epochs=2, every=2)
    assert "Image-passes: training 960, splitting 0 (0.0% more)." in (tmp_path / "run" / "report.md").read_text()


def test_a_run_without_levels_is_an_ordinary_one(tmp_path: Path) -> None:
    go(tmp_path / "run", Split(groups=[2, 2]), epochs=1)
    assert not (tmp_path / "run" / "nodes").exists() and built(Split()).split is None


def test_found_gives_the_bundle_of_the_leaf_that_serves_it(nested: tuple[Found, list[str]], tmp_path: Path) -> None:
    found = nested[0]
    out = found.bundle(tmp_path / "bundle")
    report = json.loads((out / "report.json").read_text())
    assert report["weights"] == "inherited" and report["logits_max_difference"] <= 1e-4
    plain, arch = load_bundle(out, rebuild).module.state_dict(), found.arch.arch
    leaf = grown(nested).serving(arch).strategy.network(arch).state_dict()
    kernels = [value for value in plain.values() if value.ndim == 4]  # named otherwise; norms are recalibrated
    assert kernels and all(any(torch.equal(kernel, mine) for mine in leaf.values()) for kernel in kernels)

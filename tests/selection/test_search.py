"""A search from end to end on a small model: what it finds fits, is no worse than any uniform choice, and can be made again."""

import pytest
import torch
from choosable import FORMATS, Small
from torch import nn

import fxc
from fxc.errors import UsageError, VerificationFailed
from fxc.recipe import read_recipe


def searched(model, data, budget, **options):
    given = {"formats": FORMATS, "trials": 6, "verify": False} | options
    return fxc.search(model, (data[0],), budget=budget, calib=data, eval=data[4:], **given)


@pytest.fixture(scope="module")
def model():
    return Small().eval()


@pytest.fixture(scope="module")
def half(model, data):
    said = []
    return searched(model, data, "size=0.5x", say=said.append), said


def test_the_best_within_a_size_is_no_worse_than_any_uniform_choice(half):
    found, said = half
    assert found.best.disk_bytes <= 0.5 * found.original_bytes and not found.best.misses(found.budget, found.original_bytes)
    uniform = [each for each in found.trials if each.plan.kind == "uniform" and each.disk_bytes <= 0.5 * found.original_bytes]
    assert uniform and all(found.best.loss <= each.loss for each in uniform)
    assert {"predicted", "uniform"} <= {each.plan.kind for each in found.trials} and len(found.trials) <= 6
    assert found.model.program.nbytes() == found.best.nbytes == found.space.nbytes(found.best.plan.choice)
    assert any("trial 2 of at most 6" in each and "left" in each for each in said)
    assert len({each.plan.recipe[0] if each.plan.recipe else "" for each in found.trials}) > 1


def test_predicted_stands_beside_measured(half):
    found, _ = half
    content = found.as_json()
    assert content["optimised"] == "quality" and content["recipe"] == found.recipe
    assert all(trial["predicted"] is not None or trial["kind"] == "qronos" for trial in content["trials"])
    assert -1 <= content["rank_correlation"] <= 1
    groups = {group["layers"][0]: group for group in content["groups"]}
    assert groups["left"]["format"] in groups["left"]["options"] and groups["left"]["options"]["float"]["loss"] == 0


def test_the_recipe_makes_the_same_bytes(half, model, data, tmp_path):
    found, _ = half
    recipe, record = found.save(tmp_path / "out")
    assert recipe.name == "out.toml" and record.name == "out.search.json"
    again = fxc.optimize(model, (data[0],), **read_recipe(recipe), calib=data, verify=False)
    again.save(tmp_path / "again")
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert files
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    with pytest.raises(UsageError, match="there is a file already"):
        found.save(tmp_path / "out")


@pytest.mark.fault(30)
def test_the_same_seed_finds_the_same(half, model, data):
    found, _ = half
    again = searched(model, data, "size=0.5x")
    assert [each.plan for each in again.trials] == [each.plan for each in found.trials] and again.recipe == found.recipe
    assert [each.loss for each in again.trials] == [each.loss for each in found.trials]


def test_the_smallest_within_a_loss(model, data):
    found = searched(model, data, "quality=0.1%")
    assert found.best.loss <= 0.001 and found.budget.optimised == "size"
    fitting = [each for each in found.trials if each.failed is None and each.loss <= 0.001]
    assert len(fitting) >= 2 and found.best.disk_bytes == min(each.disk_bytes for each in fitting)
    assert found.best.disk_bytes < 0.6 * found.original_bytes


def test_a_latency_is_measured_in_turns_with_the_original_and_pruning_is_tried(model, data):
    found = searched(model, data, "latency=50x,size=0.6x", sizes="1x12", trials=6)
    assert set(found.best.latencies) == {"1x12 forward"} and 0 < found.best.slowest <= 50
    costs = found.as_json()["groups"][1]["options"]
    assert all("1x12 forward" in each for each in costs.values()) and costs["float"]["1x12 forward"] == 0
    pruned = [each.plan for each in found.trials if each.plan.kind == "pruned"]
    assert pruned and all(each.recipe[0].startswith("prune:") and each.predicted is None for each in pruned)


def test_of_pruning_the_most_that_is_measured_to_keep_the_quality_is_looked_for(model, data):
    formats = "int8:mode=weight_only;int4:group=32"
    found = searched(model, data, "latency=50x,quality=0.1%", sizes="1x12", formats=formats, trials=6)
    pruned = [each for each in found.trials if each.plan.kind == "pruned"]
    assert [each.plan.recipe[0] for each in pruned][:2] == ["prune:budget=0.1:round_to=32", "prune:round_to=32"]
    assert pruned[0].loss > 0.001 >= found.best.loss


def test_what_nothing_meets_is_said_with_what_is_nearest(model, data):
    with pytest.raises(VerificationFailed) as caught:
        searched(model, data, "size=0.01x")
    assert "the smallest is" in caught.value.why and caught.value.exit_code == 5
    with pytest.raises(VerificationFailed) as caught:  # and the fastest of them is looked for
        searched(model, data, "size=0.3x,quality=0%", trials=1, sizes="1x12")
    assert "the nearest of" in caught.value.why and "a loss of" in caught.value.why


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"formats": "prune"}, "packs no layers"),
        ({"formats": "int8:only=left"}, "says itself"),
        ({"formats": ";"}, "no format"),
        ({"trials": 0}, "find nothing"),
        ({"minutes": 0}, "no time"),
        ({"minutes": float("nan")}, "no time"),
        ({"sizes": "1x12"}, "latency has no budget"),
        ({"skip": ["re:."]}, "no format takes any layer"),
    ],
)
def test_what_is_asked_for_wrongly_is_refused(model, data, options, what):
    with pytest.raises(UsageError, match=what):
        searched(model, data, "size=0.5x", **options)
    with pytest.raises(UsageError, match="learn from data"):
        fxc.search(model, (data[0],), budget="size=0.5x")
    assert torch.is_tensor(data[0])


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3)
        self.head = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


def test_convolutions_become_static_int8_by_themselves():
    generator = torch.Generator().manual_seed(3)
    images = [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(8)]
    made = fxc.search(Convolutions().eval(), (images[0],), budget="quality=2%", calib=images, eval=images[4:], trials=2)
    chosen = {layer for trial in [made.best] for each in trial.plan.passes for layer in each.limited_to()}
    assert any("mode=static" in each for each in made.best.plan.recipe) and made.best.loss <= 0.02
    assert not chosen or {"first", "second"} & chosen

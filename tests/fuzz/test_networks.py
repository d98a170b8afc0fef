"""Random networks through a pass or two, by a seed: the gates hold, what is lowered computes what the program says, and what is
saved comes back."""

import pytest
import torch

from benchmarks.fuzz import networks

EACH = 6
# Every pass alone, and as many pairs.
NUMBERS = range(2 * len(networks.PASSES))


@pytest.mark.fault(2, 3, 6, 12, 14, 15, 17)
@pytest.mark.parametrize("shard", range(len(NUMBERS) // EACH))
def test_a_random_network_goes_through_its_passes(shard, tmp_path):
    outcomes = [networks.check(0, number, tmp_path) for number in NUMBERS[shard * EACH : (shard + 1) * EACH]]
    assert "compiled" in outcomes


def test_every_pass_and_every_pair_that_can_run_is_met_once_before_any_is_met_again():
    every = len(networks.PASSES) + len(networks.pairs())
    specs = [tuple(networks.spec_of(number)) for number in range(every)]
    assert len(set(specs)) == every and networks.spec_of(every) == networks.pairs()[0]
    assert ("prune:ffn=0.3", "int8") in specs and ("int8", "prune:ffn=0.3") in specs and ("int8", "fp8") not in specs
    found = networks.coverage(range(every - 10), range(every - 10, every))
    assert found["passes"].startswith(f"{len(networks.PASSES)} of {len(networks.PASSES)} compiled, 0 declined")
    assert found["pairs of passes, in each order"].endswith("compiled, 10 declined each time")


def test_every_pass_is_tried_and_networks_are_those_of_their_seed():
    from fxc.passes.base import Pass

    tried = {each.partition(":")[0] for each in networks.PASSES}
    assert set(Pass.registry) - tried <= {"recover"} | {name for name in Pass.registry if not _is_ours(name)}
    import random

    a, b = (networks.network(random.Random("one"))[0].state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def _is_ours(name: str) -> bool:
    from fxc.passes.base import Pass

    return Pass.registry[name].__module__.startswith("fxc.")

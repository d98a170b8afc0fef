"""Values by sample: put together again in any order, and nothing where not all of it has room."""

from __future__ import annotations

import torch
from formats import normal

from fxc.train.kept import Kept


def test_values_come_back_in_the_order_of_their_samples():
    kept, logits, features = Kept(most=2000), normal(4, 5, 9), [normal(2, 3)]
    kept.add(["a", "b"], {"logits": logits, "features": features}, share=0.5)
    assert kept.bytes == 4 * (4 * 5 * 9 + 2 * 3) and kept.of(["a", "c"]) is None
    both = kept.of(["b", "a"])
    torch.testing.assert_close(both["logits"], logits[[2, 3, 0, 1]])
    torch.testing.assert_close(both["features"][0], features[0].flip(0))


def test_nothing_is_kept_where_all_would_not_fit():
    kept, value = Kept(most=1000), [normal(2, 50)]
    kept.add(["a", "b"], value, share=0.25)
    assert kept.of(["a"]) is None and kept.bytes == 0
    kept.add(["a", "b"], value, share=0.5)
    assert kept.bytes == 400
    kept.add(["c", "d", "e"], value, share=0.5)
    assert kept.of(["c"]) is None, "two rows are of no three samples"
    kept.add(["f"], [torch.tensor(1.0)], share=0.5)
    assert kept.of(["f"]) is None, "a number has no rows"

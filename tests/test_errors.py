"""How an error reads."""

import pickle

import pytest

from fxc.errors import FxcError, InputRefused, UsageError


@pytest.mark.fault(33)
def test_error_text():
    full = InputRefused("bad\x1b[31m red\x1b[0m\r\n thing", where="a\x07b", why="w\x9b2J", hint="h\u202e")
    assert str(full) == "error[FXC-E3]: a b: bad red thing\nwhy: w\ntry: h"
    assert str(UsageError("only this")) == "error[FXC-E2]: only this"
    assert str(FxcError("x\x1b]0;title\x07y", hint="z")) == "error[FXC-E1]: xy\ntry: z"
    again = pickle.loads(pickle.dumps(full))
    assert (type(again), str(again)) == (InputRefused, str(full))

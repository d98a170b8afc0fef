"""The intermediate representation: `Program`, its text, its edits, its rules."""

from fxc.ir.check import check
from fxc.ir.parse import parse_program
from fxc.ir.program import Input, Program, Signature
from fxc.ir.text import print_program

__all__ = ["Input", "Program", "Signature", "check", "parse_program", "print_program"]
